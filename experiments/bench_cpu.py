"""Ours against transformers on this CPU: the same random weights, one process, alternating runs.

    python experiments/bench_cpu.py                         # everything, about 40 minutes on 2 cores
    python experiments/bench_cpu.py --dtypes float32 --prefill 512 --decode 1 --runs 3

Prints a table of medians and writes JSON. Prefill is what generation does: append the prompt to an empty
cache and compute the logits of its last token; decode is one greedy token a row on top of a context.
Peak memory is the resident set of a process that runs one prefill of one side and nothing else, less
the resident set just before it. The matmul peak and the copy bandwidth are measured in the same run, so
that shares mean something on a noisy machine. Needs the `test` extra (torch, transformers).
"""

import dataclasses
import datetime
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import dsv4_jax
from dsv4_jax.config import ModelConfig, v4_flash
from dsv4_jax.inference import steps
from dsv4_jax.inference.generate import padded_stops
from dsv4_jax.inference.sampling import request_keys
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.cache_rows import at_length
from dsv4_jax.numerics.policy import Policy


@dataclasses.dataclass
class Options:
    """What to measure."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    prefill: tuple[int, ...] = (512, 2048, 4096)
    decode: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    context: int = 2048
    """Tokens in the cache before decoding."""
    decode_steps: int = 8
    runs: int = 5
    memory: bool = True
    """Measure peak memory in processes of their own."""
    memory_length: int = 4096
    """Tokens of the prefill whose memory is measured."""
    out: Path = Path("bench_cpu.json")


def bench_config() -> ModelConfig:
    """Flash's proportions at hidden size 512: 8 layers, 16 heads of 128, 32 experts top-6, ratios 4 / 128."""
    return dataclasses.replace(
        v4_flash(),
        vocab_size=16384,
        hidden_size=512,
        num_attention_heads=16,
        head_dim=128,
        qk_rope_head_dim=32,
        q_lora_rank=128,
        o_groups=4,
        o_lora_rank=256,
        attention_kinds=("window", "window", "csa", "hca", "csa", "hca", "csa", "hca"),
        router_kinds=("hash",) * 3 + ("learned",) * 5,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=256,
        n_routed_experts=32,
        moe_intermediate_size=256,
        num_nextn_predict_layers=0,
        max_position_embeddings=65536,
    )


def active_parameters(config: ModelConfig, lm: LanguageModel) -> int:
    """Parameters a token meets: everything but the embedding table and the experts it does not use."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.n_routed_experts - config.num_experts_per_tok
    table = config.vocab_size * config.hidden_size
    return lm.num_params - table - config.num_hidden_layers * idle * expert


def ours(folder: Path, dtype: str) -> LanguageModel:
    return dsv4_jax.load(folder, dtype=dtype)


def theirs(folder: Path, dtype: str):
    # Idle OpenMP threads would otherwise spin on a core while the other side runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import transformers

    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval()


def our_prefill(lm: LanguageModel, tokens: np.ndarray) -> Callable[[], object]:
    batch, length = tokens.shape
    counts = jnp.full((batch,), length, jnp.int32)
    ids = jnp.asarray(tokens, jnp.int32)

    def run() -> tuple[jax.Array, object]:
        last = jnp.zeros((batch, lm.config.vocab_size), jnp.float32)
        logits, cache = steps.prefill(
            lm.network, lm.parameters, lm.new_cache(batch, length + 64), ids, counts, last
        )
        return jax.block_until_ready(logits), cache

    return run


def greedy(batch: int) -> tuple[jax.Array, ...]:
    """What `steps.decode` needs to take the most likely token of every row, without an end."""
    zero, one = jnp.zeros((batch,), jnp.float32), jnp.ones((batch,), jnp.float32)
    return request_keys(0, batch), zero, one, jnp.full((batch,), steps.RUNNING, jnp.int32), padded_stops(())


def their_prefill(model, tokens: np.ndarray) -> Callable[[], object]:
    import torch

    ids = torch.from_numpy(tokens)
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def our_decode(lm: LanguageModel, tokens: np.ndarray, num_steps: int) -> Callable[[], object]:
    batch, context = tokens.shape
    state = list(our_prefill(lm, tokens)())
    drawing = greedy(batch)

    def run() -> None:
        logits, cache = state
        for _ in range(num_steps):
            _, logits, _, cache = steps.decode(lm.network, lm.parameters, cache, logits, *drawing)
        state[:] = jax.block_until_ready(logits), at_length(cache, context)

    return run


def their_decode(model, tokens: np.ndarray, num_steps: int) -> Callable[[], object]:
    import torch

    # Their cache cannot be rewound: it grows by `num_steps` a run, at most 2 % of the context in all.
    out = model(torch.from_numpy(tokens), use_cache=True, logits_to_keep=1)
    state = [out.logits[:, -1:].argmax(-1), out.past_key_values]

    def run() -> None:
        token, cache = state
        for _ in range(num_steps):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        state[0] = token

    return run


def alternate(runs: int, *sides: Callable[[], object]) -> list[float]:
    """Median seconds of each side; one warm-up each, then A B A B ..."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for side, taken in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def machine(dtype: str) -> tuple[float, float]:
    """(matmul peak in FLOP/s, copy bandwidth in bytes/s) of this process."""
    a = jnp.ones((1024, 1024), dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    (seconds,) = alternate(9, lambda: jax.block_until_ready(product(a)))
    source = np.ones(2**26, np.float32)
    target = np.empty_like(source)
    (copying,) = alternate(5, lambda: np.copyto(target, source))
    return 2 * 1024**3 / seconds, 2 * source.nbytes / copying


def _memory(field: str) -> int:
    """Bytes of a field of this process's memory status (Linux): VmRSS is now, VmHWM the highest so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


def _memory_child(side: str, folder: Path, dtype: str, length: int, queue) -> None:
    tokens = np.random.default_rng(0).integers(0, bench_config().vocab_size, (1, length))
    run = (
        our_prefill(ours(folder, dtype), tokens)
        if side == "ours"
        else their_prefill(theirs(folder, dtype), tokens)
    )
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far starts again from now
    run()
    queue.put((before, _memory("VmHWM")))


def peak_memory(side: str, folder: Path, dtype: str, length: int) -> tuple[int, int]:
    """(bytes above the loaded model, bytes in all) at the peak of one prefill, compile included."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    child = spawn.Process(target=_memory_child, args=(side, folder, dtype, length, queue))
    child.start()
    before, peak = queue.get()
    child.join()
    return peak - before, peak


def main(options: Options) -> None:
    """Runs the whole comparison."""
    console, rng, config = Console(), np.random.default_rng(0), bench_config()
    lm = LanguageModel.random(config, Policy.of("float32"))
    active = active_parameters(config, lm)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        lm.save(folder, layout="transformers")
        for dtype in options.dtypes:
            peak, bandwidth = machine(dtype)
            console.print(f"{dtype}: matmul peak {peak / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s")
            lm, model = ours(folder, dtype), theirs(folder, dtype)
            weights = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.parameters))
            cases = [("prefill", 1, length) for length in options.prefill]
            cases += [("decode", batch, options.context) for batch in options.decode]
            for work, batch, length in cases:
                tokens = rng.integers(0, config.vocab_size, (batch, length))
                if work == "prefill":
                    done = batch * length
                    sides = our_prefill(lm, tokens), their_prefill(model, tokens)
                else:
                    done = batch * options.decode_steps
                    sides = (
                        our_decode(lm, tokens, options.decode_steps),
                        their_decode(model, tokens, options.decode_steps),
                    )
                mine, other = alternate(options.runs, *sides)
                rows.append(
                    {
                        "dtype": dtype,
                        "work": work,
                        "batch": batch,
                        "length": length,
                        "ours_tokens_per_second": done / mine,
                        "transformers_tokens_per_second": done / other,
                        "ratio": other / mine,
                        "linear_flops_share_of_peak": 2 * active * done / mine / peak,
                        "weight_bytes_share_of_copy": (
                            weights * options.decode_steps / mine / bandwidth if work == "decode" else None
                        ),
                    }
                )
                keep(options, rows, console)
            if options.memory:
                length = options.memory_length
                mine, other = (peak_memory(s, folder, dtype, length) for s in ("ours", "theirs"))
                rows.append(
                    {
                        "dtype": dtype,
                        "work": "peak memory",
                        "batch": 1,
                        "length": length,
                        "ours_bytes": mine[0],
                        "transformers_bytes": other[0],
                        "ours_bytes_in_all": mine[1],
                        "transformers_bytes_in_all": other[1],
                        "ratio": other[0] / mine[0],
                    }
                )
                keep(options, rows, console)
    show(console, rows)
    console.print(f"written: {options.out}")


def keep(options: Options, rows: list[dict[str, object]], console: Console) -> None:
    """Prints the newest row and writes all so far: a long run that dies loses nothing."""
    console.print(json.dumps(rows[-1]))
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"date": stamp, "jax": jax.__version__, "runs": options.runs, "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def show(console: Console, rows: list[dict[str, object]]) -> None:
    """The table."""
    table = Table("dtype", "work", "batch", "length", "ours", "transformers", "ratio", "of peak")
    for row in rows:
        unit = "bytes" if "ours_bytes" in row else "tokens_per_second"
        scale, name = (2**20, "MiB") if unit == "bytes" else (1, "tok/s")
        mine, other = (float(row[f"{s}_{unit}"]) / scale for s in ("ours", "transformers"))  # type: ignore[arg-type]
        share = row.get("linear_flops_share_of_peak")
        table.add_row(
            str(row["dtype"]),
            str(row["work"]),
            str(row["batch"]),
            str(row["length"]),
            f"{mine:.1f} {name}",
            f"{other:.1f} {name}",
            f"{float(row['ratio']):.2f}x",  # type: ignore[arg-type]
            "" if share is None else f"{float(share):.0%}",  # type: ignore[arg-type]
        )
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
