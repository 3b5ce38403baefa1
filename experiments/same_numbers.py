"""Do two commits compute the same bits? Digests of everything that a change of structure must leave alone.

    python -m experiments.same_numbers --write before.json     (in the tree of the one commit)
    python -m experiments.same_numbers --against before.json   (in the tree of the other)

On small models with every kind of layer, on this machine's CPU: drawn parameters, logits, residual streams,
MTP logits, tokens of greedy generation and logits through the cache (every cache format), gradients of a
loss, and the bytes of saved folders; in float32 and bfloat16, with plain weights and with FP8 and FP4
weights held as they are. Only public names are used, so that old commits can be asked too. Exit code 1 when
a digest differs.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_jax
from dsv4_jax.checkpoint.convert import convert_checkpoint

CACHES = ("plain", "fp8+fp8", "fp8+mxfp4")
CONFIG = dict(hidden_size=128, num_attention_heads=4)  # whole blocks of 128 numbers a scale


def digest(tree: object) -> str:
    """One digest over paths, dtypes, shapes and bytes of all arrays."""
    total = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in sorted((jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves):
        total.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        total.update(leaf.tobytes())
    return total.hexdigest()


def folder_digest(folder: pathlib.Path) -> dict[str, str]:
    """A digest for each file."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def tokens(vocab: int, batch: int = 2, length: int = 150) -> np.ndarray:
    """i32[B, T]: more than an HCA block of 128 tokens, and ragged for CSA's blocks of 4."""
    return np.random.default_rng(7).integers(0, vocab, (batch, length)).astype(np.int32)


def scoring(lm: dsv4_jax.LanguageModel) -> Iterator[tuple[str, str]]:
    """Whole sequences."""
    ids = tokens(lm.config.vocab_size)
    yield "logits", digest(lm.logits(ids))
    yield "streams", digest(lm.streams(ids))
    yield "mtp_logits", digest(lm.mtp_logits(ids))


def caching(lm: dsv4_jax.LanguageModel) -> Iterator[tuple[str, str]]:
    """Through the cache: greedy tokens, and logits of a prompt in two pieces and one token more."""
    ids = tokens(lm.config.vocab_size)
    yield "greedy", digest(lm.generate(ids[:, :40], 6))
    cache = lm.new_cache(2, 256)
    pieces = []
    for first, last in ((0, 131), (131, 149), (149, 150)):
        logits, cache = lm.extend(cache, ids[:, first:last], np.full(2, last - first, np.int32))
        pieces.append(np.asarray(logits))
    yield "extend", digest(pieces)


def gradients(lm: dsv4_jax.LanguageModel) -> str:
    """Of the mean negative log likelihood, to all parameters that have a gradient."""
    ids = tokens(lm.config.vocab_size)
    trained, fixed = dsv4_jax.trainable(lm.parameters)

    @jax.jit
    def loss(trained: dict) -> jax.Array:
        whole = dsv4_jax.LanguageModel(lm.config, lm.policy, dsv4_jax.joined(trained, fixed))
        log_p = jax.nn.log_softmax(whole.logits(jnp.asarray(ids)))
        return -jnp.take_along_axis(log_p[:, :-1], ids[:, 1:, None], axis=-1).mean()

    return digest(jax.grad(loss)(trained))


def digests() -> Iterator[tuple[str, str | dict[str, str]]]:
    """(what was computed, its digest), one after the other."""
    for like in ("flash", "pro"):
        config = dsv4_jax.tiny(5, like=like, **CONFIG)
        for dtype in ("float32", "bfloat16"):
            lm = dsv4_jax.LanguageModel.random(config, dsv4_jax.Policy.of(dtype), 1)
            name = f"{like} {dtype}"
            yield f"{name} parameters", digest(lm.parameters)
            for what, value in scoring(lm):
                yield f"{name} {what}", value
            yield f"{name} gradients", gradients(lm)
            if like == "pro":
                continue
            for cache in CACHES:
                policy = dsv4_jax.Policy.of(dtype, cache=cache)
                for what, value in caching(dsv4_jax.LanguageModel(config, policy, lm.parameters)):
                    yield f"{name} {what} cache {cache}", value
    yield from on_disk(dsv4_jax.tiny(4, **CONFIG))


def on_disk(config: dsv4_jax.ModelConfig) -> Iterator[tuple[str, str | dict[str, str]]]:
    """Saved and converted folders, and models loaded from them."""
    with tempfile.TemporaryDirectory() as root:
        plain = pathlib.Path(root) / "plain"
        dsv4_jax.LanguageModel.random(config, dsv4_jax.Policy.of("float32"), 1).save(plain)
        yield "saved plain", folder_digest(plain)
        for to, layout in (
            ("fp8", "official"),
            ("fp8-fp4", "official"),
            ("bfloat16", "transformers"),
        ):
            folder = pathlib.Path(root) / to
            convert_checkpoint(plain, folder, layout=layout, to=to)
            yield f"converted {to}", folder_digest(folder)
            for dtype in ("float32", "bfloat16"):
                lm = dsv4_jax.load(folder, dtype)
                name = f"native {to} {dtype}"
                yield f"{name} parameters", digest(lm.parameters)
                ids = tokens(config.vocab_size)
                yield f"{name} logits", digest(lm.logits(ids))
                yield f"{name} greedy", digest(lm.generate(ids[:, :40], 4))
                again = pathlib.Path(root) / f"{to} {dtype} again"
                lm.save(again, layout=layout)
                yield f"{name} saved", folder_digest(again)


def main() -> int:
    """Runs the comparison; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", type=pathlib.Path, help="JSON file for this tree's digests")
    group.add_argument("--against", type=pathlib.Path, help="JSON file of another tree to compare with")
    args = parser.parse_args()
    before = json.loads(args.against.read_text()) if args.against else None
    found: dict[str, object] = {}
    different = 0
    for name, value in digests():
        found[name] = value
        verdict = ""
        if before is not None:
            verdict = "same" if before.get(name) == value else "DIFFERENT"
            different += verdict == "DIFFERENT"
        print(f"{name:45s} {verdict or str(value)[:16]}", flush=True)
    if before is None:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    missing = sorted(before.keys() - found.keys())
    print(f"{len(found)} digests, {different} different, {len(missing)} missing {missing}")
    return int(bool(different or missing))


if __name__ == "__main__":
    sys.exit(main())
