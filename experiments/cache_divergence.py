"""How far a quantised cache moves a trained model's predictions.

    dsv4 quickstart --out quickstart
    python -m experiments.cache_divergence quickstart

Held-out text goes through the cache in chunks (teacher-forced: every token is real text, none is drawn), once
with a plain float32 cache and once with each variant, and every predicted distribution is compared:

    KL          sum_v p(v) log(p(v) / q(v)) in nats, p of the plain cache, q of the variant
    agreement   share of positions whose most likely token is the same
    loss        mean of -log q(next token); its difference to the plain cache's

bfloat16 without any quantisation is there as a yardstick. "qat" is the whole simulation of the official code
(activations, cache, index scores and expert weights), not only the cache.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

import dsv4_jax
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.recipe import QUICKSTART
from dsv4_jax.training.tokenizer import encode_documents
from experiments import study_record

VARIANTS = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8+fp8": {"cache": "fp8+fp8"},
    "fp8+mxfp4": {"cache": "fp8+mxfp4"},
    "qat": {"numerics": "qat"},
    "qat, fp8+mxfp4": {"numerics": "qat", "cache": "fp8+mxfp4"},
}
"""Name -> what is passed to `dsv4_jax.load` beside dtype="float32"; the first is what others differ from."""


@dataclasses.dataclass
class Options:
    """What to compare, on how much text."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder of `dsv4 quickstart`."""
    rows: int = 8
    length: int = 1024
    """Tokens a row; a row starts at position 0 wherever it was cut from the text."""
    chunk: int = 128
    """Tokens appended to the cache at once."""
    out: Path = Path("experiments/results/cache_divergence.json")
    """Also names the table (`.md`)."""


def held_out(model: LanguageModel, rows: int, length: int) -> np.ndarray:
    """i32[rows, length] of validation text, evenly spread over it.

    Raises:
        ValueError: if the text is too short.
    """
    documents = gather_corpus(QUICKSTART.corpus_bytes).validation
    stream = np.concatenate(encode_documents(model.tokenizer, [document.text for document in documents]))
    if len(stream) < rows * length:
        raise ValueError(f"{len(stream)} held-out tokens are fewer than {rows} rows of {length}")
    starts = np.linspace(0, len(stream) - length, rows).astype(int)
    return np.stack([stream[start : start + length] for start in starts])


def log_probabilities(model: LanguageModel, tokens: np.ndarray, chunk: int):
    """f32[rows, <= chunk, V] for one chunk of positions after the other, through the model's cache."""
    rows, length = tokens.shape
    cache = model.new_cache(rows, length)
    for start in range(0, length, chunk):
        logits, cache = model.extend(cache, jnp.asarray(tokens[:, start : start + chunk], jnp.int32))
        yield jax.nn.log_softmax(logits)


@jax.jit
def compared(p: jax.Array, q: jax.Array, following: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(KL, same most likely token, -log q(following)) of every position; log-probabilities [.., V]."""
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = p.argmax(axis=-1) == q.argmax(axis=-1)
    return kl, same, -jnp.take_along_axis(q, following[..., None], axis=-1)[..., 0]


def measure(plain: LanguageModel, variant: LanguageModel, tokens: np.ndarray, chunk: int) -> dict[str, float]:
    """Means (and the tail of the KL) over all positions that have a next token."""
    following = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], -1)], axis=1)
    found: list[list[np.ndarray]] = [[], [], []]
    both = (log_probabilities(model, tokens, chunk) for model in (plain, variant))
    for index, (p, q) in enumerate(zip(*both, strict=True)):
        wanted = following[:, index * chunk : (index + 1) * chunk]
        for part, values in zip(found, compared(p, q, jnp.asarray(np.maximum(wanted, 0))), strict=True):
            part.append(np.asarray(values)[wanted >= 0])
    kl, same, nll = (np.concatenate(part).astype(np.float64) for part in found)
    return {
        "tokens": kl.size,
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_99_percent": np.quantile(kl, 0.99),
        "kl_max": kl.max(),
        "agreement": same.mean(),
        "loss": nll.mean(),
    }


def markdown(record: dict[str, Any]) -> str:
    """The table of the variants so far."""
    base = record["rows"][0]["loss"]
    rows = [
        [
            row["variant"],
            *(f"{row[name]:.1e}" for name in ("kl_mean", "kl_median", "kl_99_percent", "kl_max")),
            f"{row['agreement']:.2%}",
            f"{row['loss']:.4f}",
            f"{row['loss'] - base:+.4f}",
        ]
        for row in record["rows"]
    ]
    header = ["variant", "KL mean", "median", "99 %", "max", "same top token", "loss", "difference"]
    options = record["options"]
    return (
        "# Predictions with a quantised cache against a plain one\n\n"
        f"{record['date']}, {record['machine']}, jax {record['jax']}, `{record['command']}`\n\n"
        f"The quickstart's model, float32 unless named otherwise; {options['rows']} rows of "
        f"{options['length']} held-out tokens, appended {options['chunk']} at a time. KL in nats a token "
        "against the plain cache, loss in nats a token. qat rounds activations, index scores and expert "
        f"weights too.\n\n{study_record.table(header, rows)}"
    )


def main(options: Options) -> None:
    """Runs every variant beside the plain cache."""
    console = Console()
    record = study_record.stamp("cache_divergence")
    record |= {
        "options": {name: getattr(options, name) for name in ("rows", "length", "chunk")},
        "rows": [],
    }
    plain = dsv4_jax.load(options.checkpoint, dtype="float32")
    tokens = held_out(plain, options.rows, options.length)
    for name, choices in VARIANTS.items():
        model = dsv4_jax.load(options.checkpoint, **({"dtype": "float32"} | choices))
        row = {"variant": name} | measure(plain, model, tokens, options.chunk)
        record["rows"].append(row)
        study_record.write(options.out, record, markdown(record))
        console.print(row)
    console.print(f"written: {options.out} and .md")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
