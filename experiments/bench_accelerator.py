"""The XLA path on the accelerator at hand: prefill and decode, next to what the chip can do.

    python -m experiments.bench_accelerator                          # minutes on one GPU of 80 GB
    python -m experiments.bench_accelerator --models small --dtypes float32

Two models with random weights: "small" is that of `bench_cpu.py`, "flash" has V4-Flash's widths with one
layer of each kind (window, CSA, HCA), 256 experts and the whole vocabulary, about 21 billion parameters.
Prints a table of medians and writes JSON, next to the matrix product and the copy that the same process
measured. The floor is what the chip needs at those two rates: to multiply by every weight that a token meets,
or to read once every weight that some token meets, whichever takes longer. Kernels are not used: this is what
a user gets where no kernel exists.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.config import ModelConfig, v4_flash
from dsv4_jax.inference import steps
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.cache_rows import at_length
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from experiments import study_record
from experiments.bench_cpu import bench_config, greedy, our_prefill

COLUMNS = ("model", "dtype", "work", "batch", "length", "ms", "tokens/s", "floor ms")


@dataclasses.dataclass
class Options:
    """What to measure."""

    models: tuple[Literal["small", "flash"], ...] = ("small", "flash")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the small model; the other one is bfloat16."""
    prefill: tuple[int, ...] = (2048,)
    decode: tuple[int, ...] = (1, 64)
    """Batch sizes."""
    context: int = 2048
    """Tokens that the cache is said to hold before decoding; they are zeros."""
    decode_steps: int = 8
    runs: int = 7
    out: Path = Path("bench_accelerator.json")


def flash_widths() -> ModelConfig:
    """V4-Flash with one layer of each kind."""
    return dataclasses.replace(
        v4_flash(),
        attention_kinds=("window", "csa", "hca"),
        router_kinds=("hash", "learned", "learned"),
        num_nextn_predict_layers=0,
    )


def drawn_on_device(config: ModelConfig, policy: Policy) -> LanguageModel:
    """Random parameters without a copy of them on the host; their values mean nothing."""
    network = Network(config, policy)
    # Drawn once, and repeated: a program that draws each shape would take longer to compile than to time.
    drawn = np.random.default_rng(0).standard_normal(2**20 + 7).astype(np.float32) * 0.02
    pools = {np.dtype(dtype): jnp.asarray(drawn, dtype) for dtype in ("float32", policy.param_dtype)}

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):  # a hash table: different experts for each token
            first = np.arange(leaf.shape[-2], dtype=np.int32)[:, None] * leaf.shape[-1]
            table = (first + np.arange(leaf.shape[-1], dtype=np.int32)) % config.n_routed_experts
            return jnp.broadcast_to(jnp.asarray(table), leaf.shape)
        if leaf.ndim < 3 and config.vocab_size not in leaf.shape:  # norms, sinks, biases of repeated layers
            return jnp.ones(leaf.shape, leaf.dtype)
        repeats = -(-leaf.size // len(drawn))
        return jnp.tile(pools[leaf.dtype], repeats)[: leaf.size].reshape(leaf.shape)

    return LanguageModel(config, policy, jax.tree.map(draw, network.shapes()))


def decode(lm: LanguageModel, batch: int, context: int, num_steps: int) -> Callable[[], object]:
    """Greedy steps of `batch` sequences; every run starts at `context` again."""
    cache = at_length(lm.new_cache(batch, context + 64), context)
    state = [jax.random.normal(jax.random.key(1), (batch, lm.config.vocab_size)), cache]
    drawing = greedy(batch)

    def run() -> jax.Array:
        logits, cache = state
        for _ in range(num_steps):
            _, logits, _, cache = steps.decode(lm.network, lm.parameters, cache, logits, *drawing)
        state[:] = logits, at_length(cache, context)
        return logits

    return run


def seconds_of(run: Callable[[], object], runs: int) -> float:
    """Median of several runs that wait for their results, after two that compile and warm up."""
    times = []
    for index in range(2 + runs):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if index >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peaks(dtype: str) -> tuple[float, float]:
    """(FLOP/s of a large matrix product in this dtype, bytes/s of a large copy) on this device."""
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), dtype) for i in range(2))
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32))
    flops = 2 * 8192**3 / seconds_of(lambda: product(a, b), 9)
    much = jnp.ones(2**29, jnp.float32)
    copying = jax.jit(lambda x: x + 1)
    return flops, 2 * much.nbytes / seconds_of(lambda: copying(much), 9)


def floor_seconds(lm: LanguageModel, tokens: int, num_steps: int, flops: float, bandwidth: float) -> float:
    """Of `num_steps` calls with `tokens` tokens each; see the module's docstring."""
    config = lm.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    table = config.vocab_size * config.hidden_size
    met = lm.num_params - table - (config.n_routed_experts - config.num_experts_per_tok) * expert
    # Of E experts, tokens that choose evenly and independently leave this share out.
    idle = (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    read = lm.num_params - table - idle * config.n_routed_experts * expert
    width = jnp.dtype(lm.policy.param_dtype).itemsize
    return num_steps * max(2 * met * tokens / flops, read * width / bandwidth)


def rows_of(name: str, lm: LanguageModel, options: Options, dtype: str) -> list[tuple[object, ...]]:
    """All cases of one model, a row each as in COLUMNS."""
    rng, rows = np.random.default_rng(0), []
    flops, bandwidth = peaks(dtype)
    print(f"{name} {dtype}: product {flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    cases = [("prefill", 1, length) for length in options.prefill]
    cases += [("decode", batch, options.context) for batch in options.decode]
    for work, batch, length in cases:
        if work == "prefill":
            tokens = rng.integers(0, lm.config.vocab_size, (batch, length))
            run, done, num_steps = our_prefill(lm, tokens), batch * length, 1
        else:
            run, num_steps = decode(lm, batch, length, options.decode_steps), options.decode_steps
            done = batch * num_steps
        taken = seconds_of(run, options.runs)
        floor = floor_seconds(lm, done // num_steps, num_steps, flops, bandwidth)
        each = 1e3 / num_steps
        speed = f"{taken * each:.2f}", f"{done / taken:.0f}", f"{floor * each:.3f}"
        rows.append((name, dtype, work, batch, length, *speed))
        print(*rows[-1], flush=True)
    return rows


def main(options: Options) -> None:
    """Runs every case and writes after every model."""
    device = jax.devices()[0]
    Console().print(f"{device.device_kind}, {device.platform}")
    record = study_record.stamp("bench_accelerator")
    record |= {"device": device.device_kind, "rows": []}
    for name in options.models:
        config = bench_config() if name == "small" else flash_widths()
        for dtype in options.dtypes if name == "small" else ("bfloat16",):
            lm = drawn_on_device(config, Policy.of(dtype))
            record["rows"] += rows_of(name, lm, options, dtype)
            study_record.write(options.out, record, study_record.table(COLUMNS, record["rows"]))
            del lm
    Console().print(f"written: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
