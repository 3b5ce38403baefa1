"""A million tokens of context on one machine: bytes, step time by context, and which term grows.

    python -m experiments.long_context               # minutes on 2 idle cores, 6 GB
    python -m experiments.long_context --capacity 16384 --contexts 4096 16000 --runs 3

The model is tiny in everything but what the cache keeps: the released entry geometry (Dh = 512 with 64 rotary
channels, Di = 128), ratios 4 and 128, window 128, top-k 512, one layer of each kind, few heads. So the entry
and key of a CSA layer are exactly 584 + 68 bytes in fp8+mxfp4, and bytes a token follow a release's formula
with n_CSA = n_HCA = 1. Step times are of this tiny model on a CPU: only their growth means something.

A prefill of 2^20 tokens takes longer than half an hour here (the record estimates it from measured chunks),
so the cache is filled synthetically: random entries and keys of unit variance (what RMSNorm gives), stored on
each format's own grid, random rows in the rings, then the
length is set. `tests/experiments/test_long_context.py` compares such a cache with a real prefill at a small
length: the same tree, shapes, dtypes and bytes, and the same rows written. Steps then decode as always.
"""

import dataclasses
import functools
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from dsv4_jax.config import ModelConfig, v4_flash
from dsv4_jax.inference import steps
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.cache_rows import at_length
from dsv4_jax.model.cache_stores import Store, stores, with_stores
from dsv4_jax.numerics import cache_formats
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS, CacheFormat, Stored
from dsv4_jax.numerics.cache_storage import num_slots
from dsv4_jax.numerics.policy import Policy
from experiments import long_context_terms, study_record
from pallas_kernels.formats.bits import as_stored

KINDS = ("window", "csa", "hca")
ENTRY_BYTES = {"plain": 512 * 4, "fp8+fp8": 584, "fp8+mxfp4": 584}
KEY_BYTES = {"plain": 128 * 4, "fp8+fp8": 132, "fp8+mxfp4": 68}
"""By hand (plain: float32), so that the arrays are held against something they do not decide."""


@dataclasses.dataclass
class Options:
    """What to measure."""

    capacity: int = 2**20
    contexts: tuple[int, ...] = (4096, 65536, 2**20)
    formats: tuple[CacheFormat, ...] = ("fp8+mxfp4", "plain", "fp8+fp8")
    steps: int = 2
    """Decoded tokens a run; a run ends at its context."""
    runs: int = 7
    prefill_chunk: int = 256
    """Tokens of a prefill chunk; one is timed at every context, in the first format."""
    by_kind: bool = True
    """Also models with one layer of one kind, in the first format: which one grows."""
    out: Path = Path("experiments/results/long_context.json")
    """Also names the table (`.md`)."""


def tiny_model(kinds: tuple[str, ...] = KINDS) -> ModelConfig:
    """One layer of each kind; the cache's widths and ratios are the released ones."""
    return dataclasses.replace(
        v4_flash(),
        vocab_size=512,
        hidden_size=64,
        num_attention_heads=4,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        attention_kinds=kinds,
        router_kinds=("learned",) * len(kinds),
        index_n_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_nextn_predict_layers=0,
    )


def bytes_by_formula(config: ModelConfig, format: CacheFormat) -> float:
    """n_CSA (entry + key) / 4 + n_HCA entry / 128, a token."""
    num_csa, num_hca = config.attention_kinds.count("csa"), config.attention_kinds.count("hca")
    entry, key = ENTRY_BYTES[format], KEY_BYTES[format]
    return num_csa * (entry + key) / config.csa_ratio + num_hca * entry / config.hca_ratio


def num_bytes(tree: Any) -> int:
    """Of all arrays, as allocated."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def entries_of(cache: Cache) -> list[Stored]:
    """What grows with the context: the entries and keys of every layer."""
    return [store.stored for store in stores(cache) if store.holds in ("entries", "keys")]


# ---- synthetic fill --------------------------------------------------------------------------------------


def filled(cache: Cache, config: ModelConfig, format: CacheFormat, length: int, seed: int = 0) -> Cache:
    """The cache as after `length` tokens, with random values in place of computed ones; `cache` is consumed.

    Raises:
        ValueError: if the cache has more than one row, or does not hold so many tokens.
    """
    most = int(cache.counts().max_length.min())
    if len(cache.length) != 1 or not 0 < length <= most:
        raise ValueError(f"length={length}, {len(cache.length)} rows: one row of 1..{most} tokens")
    keys = iter(jax.random.split(jax.random.key(seed), 1024))
    store_entries = functools.partial(
        cache_formats.store_entries, format=format, num_rotary=config.qk_rope_head_dim
    )
    store_keys = functools.partial(cache_formats.store_keys, format=format)

    def rows(store: Store) -> Stored:
        match store.holds:
            case "rows":
                count, width, kept = length, None, None
            case "window":
                count, width, kept = length, config.head_dim, store_entries
            case "entries":
                count, width, kept = length // config.ratio(store.kind), config.head_dim, store_entries
            case "keys":
                count, width, kept = length // config.ratio(store.kind), config.index_head_dim, store_keys
        return _with_random_rows(store.stored, next(keys), count, width, kept)

    return at_length(with_stores(cache, [rows(store) for store in stores(cache)]), length)


@functools.partial(jax.jit, static_argnums=(2, 3, 4), donate_argnums=0)
def _with_random_rows(stored: Stored, key: jax.Array, count: int, width: int | None, store) -> Stored:
    """The first `count` rows (all of a shorter ring) drawn from N(0, 1) and stored; the others stay."""
    slots = num_slots(stored)
    first = jax.tree.leaves(stored)[0]
    shape = (*first.shape[:2], min(count, slots), *((width,) if width else first.shape[3:]))
    rows = jax.random.normal(key, shape)
    new = rows if store is None else store(rows)

    def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[:, :, : shape[2]].set(as_stored(new, leaf.dtype))

    return jax.tree.map(write, stored, new)


# ---- one step --------------------------------------------------------------------------------------------


class Decoder:
    """A compiled step and a full cache, replayed at any context: only the length moves."""

    def __init__(self, kinds: tuple[str, ...], format: CacheFormat, capacity: int, chunk: int = 1) -> None:
        self.config = tiny_model(kinds)
        model = LanguageModel.random(self.config, Policy.of("float32", cache=format))
        self.parameters = model.parameters
        self.cache = filled(model.new_cache(1, capacity), self.config, format, capacity)
        self.token = jnp.zeros((1, chunk), jnp.int32)
        self.appended = jnp.full((1,), chunk, jnp.int32)
        self.logits = jnp.zeros((1, self.config.vocab_size), jnp.float32)
        operands = (self.parameters, self.cache, self.token, self.appended, self.logits)
        self.program = steps.prefill.lower(model.network, *operands).compile()

    @property
    def temporary_bytes(self) -> int:
        """What a step allocates beside the cache it updates in place."""
        return self.program.memory_analysis().temp_size_in_bytes

    def step(self, cache: Cache) -> Cache:
        """Appends the chunk and scores what follows it; one token: greedy decoding without the choice."""
        self.logits, cache = self.program(self.parameters, cache, self.token, self.appended, self.logits)
        return cache

    def run(self, context: int, num_steps: int) -> tuple[float, float]:
        """Seconds of one step by the clock, and of all cores; means. The last step makes the context full."""
        cache = at_length(self.cache, context - (num_steps + 1) * self.token.shape[1])
        # Not timed: the step after another decoder's finds cold caches and returned memory.
        cache = self.step(cache)
        jax.block_until_ready(self.logits)
        start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            cache = self.step(cache)
        jax.block_until_ready(self.logits)
        taken, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        if not bool(jnp.isfinite(self.logits).all()):
            raise FloatingPointError(f"logits at context {context} are not finite")
        self.cache = cache
        return taken / num_steps, cpu / num_steps


def step_times(decoders: dict[str, Decoder], options: Options) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of a step: "clock" (the fastest run) and "cpu" (the median) -> decoder -> context.

    Every run visits all decoders in turn. On a shared machine the fastest run was disturbed least.
    """
    taken = {name: {context: [] for context in options.contexts} for name in decoders}
    for run in range(options.runs + 1):
        for name, decoder in decoders.items():
            for context in options.contexts:
                seconds = decoder.run(context, options.steps)
                if run:  # the first touches memory for the first time
                    taken[name][context].append([1000 * x for x in seconds])

    def summary(choose, which: int) -> dict[str, dict[str, float]]:
        return {
            name: {str(c): choose([run[which] for run in runs]) for c, runs in by.items()}
            for name, by in taken.items()
        }

    return {"clock": summary(min, 0), "cpu": summary(statistics.median, 1)}


def prefill_seconds(chunk_seconds: dict[int, float], chunk: int) -> float:
    """CPU time of a whole prefill up to the last context, from that of one chunk at each.

    A chunk's time is taken as straight lines between the measured contexts, and as the first one's before it.
    """
    contexts = sorted(chunk_seconds)
    total = chunk_seconds[contexts[0]] * contexts[0]
    for low, high in itertools.pairwise(contexts):
        total += (chunk_seconds[low] + chunk_seconds[high]) / 2 * (high - low)
    return total / chunk


# ---- record ----------------------------------------------------------------------------------------------


def measured_bytes(decoder: Decoder, format: CacheFormat, capacity: int) -> dict[str, Any]:
    """Bytes of the arrays of a cache, beside the formula."""
    grows = num_bytes(entries_of(decoder.cache))
    return {
        "format": format,
        "cache_bytes": num_bytes(decoder.cache),
        "entry_bytes": grows,
        "bytes_per_token": grows / capacity,
        "formula": bytes_by_formula(decoder.config, format),
        "state_bytes": num_bytes(decoder.cache) - grows,
        "step_temporary_bytes": decoder.temporary_bytes,
    }


def markdown(record: dict[str, Any]) -> str:
    """Both tables so far."""
    bytes_rows = [
        [
            row["format"] + (" (float32)" if row["format"] == "plain" else ""),
            f"{row['bytes_per_token']:.2f}",
            f"{row['formula']:.2f}",
            f"{row['entry_bytes'] / 2**20:.1f}",
            f"{row['state_bytes'] / 2**20:.2f}",
            f"{row['step_temporary_bytes'] / 2**20:.1f}",
        ]
        for row in record["bytes"]
    ]
    contexts = [str(context) for context in record["options"]["contexts"]]
    times = [
        [name, *(f"{clock[c]:.2f} / {record['cpu_milliseconds'][name][c]:.2f}" for c in contexts)]
        for name, clock in record["step_milliseconds"].items()
    ]
    capacity = record["options"]["capacity"]
    text = (
        "# A long context on one machine\n\n"
        f"{record['date']}, {record['machine']}, jax {record['jax']}, `{record['command']}`; "
        f"load average {record['load_average']:.1f} at the start (an idle machine: 0).\n\n"
        f"One layer of each kind, released entry geometry and ratios, everything else tiny; capacity "
        f"{capacity:,} tokens, float32 compute. **Synthetic fill**: random entries on each format's grid, "
        "then the length is set; the decoded steps are real.\n\n"
        + study_record.table(
            [
                "cache",
                "bytes a token",
                "formula",
                "entries and keys MiB",
                "state MiB",
                "step temporaries MiB",
            ],
            bytes_rows,
        )
        + "\nMilliseconds of one decode step by context: by the clock (fastest of "
        f"{record['options']['runs']} alternating runs of {record['options']['steps']} steps) / CPU time "
        "(median). One layer of each kind unless named alone.\n\n"
        + study_record.table(["model", *(f"{int(c):,} tokens" for c in contexts)], times)
    )
    if growth := record.get("growth"):
        text += "\n" + long_context_terms.explained(growth, record["cpu_milliseconds"][growth["format"]])
    if prefill := record.get("prefill"):
        text += "\n" + prefill_text(prefill)
    return text


def prefill_text(prefill: dict[str, Any]) -> str:
    """What a real prefill would take."""
    chunk = prefill["chunk"]
    rates = ", ".join(
        f"{chunk / seconds:,.0f} at {int(context):,}" for context, seconds in prefill["chunk_seconds"].items()
    )
    return (
        f"Prefill, {prefill['format']}: a chunk of {chunk} tokens that ends at a context, tokens a second of "
        f"CPU time: {rates}. **Extrapolated**, with straight lines between these: "
        f"{prefill['seconds'] / 60:.0f} minutes of CPU time for all {int(prefill['context']):,} tokens.\n"
    )


def main(options: Options) -> None:
    """Measures everything; written after every group."""
    console = Console()
    record = study_record.stamp("long_context")
    shown = {name: value for name, value in dataclasses.asdict(options).items() if name != "out"}
    record |= {"options": shown, "load_average": os.getloadavg()[0], "bytes": []}
    record |= {"step_milliseconds": {}, "cpu_milliseconds": {}}
    config, first = tiny_model(), options.formats[0]

    def measure(groups: dict[str, tuple[tuple[str, ...], CacheFormat]], count_bytes: bool) -> None:
        decoders = {name: Decoder(*chosen, options.capacity) for name, chosen in groups.items()}
        if count_bytes:
            record["bytes"] += [
                measured_bytes(decoders[name], format, options.capacity)
                for name, (_, format) in groups.items()
            ]
        times = step_times(decoders, options)
        record["step_milliseconds"] |= times["clock"]
        record["cpu_milliseconds"] |= times["cpu"]
        study_record.write(options.out, record, markdown(record))
        console.print(markdown(record))
        if count_bytes:
            explain(decoders[first].cache)

    def explain(cache: Cache) -> None:
        of_key = {"key": KEY_BYTES[first], "entry": ENTRY_BYTES[first]}
        read = {c: long_context_terms.bytes_read(config, c, **of_key) for c in options.contexts}
        record["growth"] = {
            "format": first,
            "runs": options.runs,
            "milliseconds": long_context_terms.term_milliseconds(
                config, cache, options.contexts, options.runs
            ),
            "bytes": {
                name: {str(c): by[name] for c, by in read.items()} for name in read[options.contexts[0]]
            },
        }
        study_record.write(options.out, record, markdown(record))

    measure({format: (KINDS, format) for format in options.formats}, True)
    chunk = options.prefill_chunk
    decoder = Decoder(KINDS, first, options.capacity, chunk)
    by_context = {c: min(decoder.run(c, 1)[1] for _ in range(2)) for c in options.contexts if c >= 2 * chunk}
    record["prefill"] = {
        "format": first,
        "chunk": chunk,
        "chunk_seconds": {str(c): seconds for c, seconds in by_context.items()},
        "context": max(by_context),
        "seconds": prefill_seconds(by_context, chunk),
    }
    study_record.write(options.out, record, markdown(record))
    console.print(prefill_text(record["prefill"]))
    if options.by_kind:
        measure({f"{kind} alone, {first}": ((kind,), first) for kind in KINDS}, False)
    console.print(f"written: {options.out} and .md")


if __name__ == "__main__":
    assert set(ENTRY_BYTES) == set(CACHE_FORMATS)
    main(tyro.cli(Options, description=__doc__))
