"""Why a decode step grows with the context: each growing part of it on its own, bytes and time.

    term            reads, at a context of n tokens                     layers
    index scores    floor(n / 4) keys, writes as many float32 scores    CSA
    top-k           floor(n / 4) float32 scores                         CSA, with more keys than top-k
    HCA attention   floor(n / 128) entries                              HCA

The step reads power-of-two prefixes; contexts that are powers of two times 128 fill them exactly. The entries
that the indexer chose are top-k at most, whatever n.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.cache_stores import stores
from dsv4_jax.model.entries import Entries
from experiments import study_record
from pallas_kernels.core_attention.xla import softmax_attention
from pallas_kernels.indexer.xla import index_scores_xla

SCORE_BYTES = 4


def terms(config: ModelConfig, cache: Cache, context: int) -> dict[str, Callable[[], jax.Array]]:
    """Term -> the compiled operation of one layer at this context, over the entries of the cache."""
    held = {(store.kind, store.holds): store.stored for store in stores(cache)}
    first = jnp.int32(0)
    random = iter(jax.random.split(jax.random.key(0), 8))

    def compiled(function: Callable[..., jax.Array], *operands: Any) -> Callable[[], jax.Array]:
        program = jax.jit(function).lower(*operands).compile()
        return lambda: program(*operands)

    num_keys, num_hca = context // config.csa_ratio, context // config.hca_ratio
    heads, width = config.index_n_heads, config.index_head_dim
    index_q = jax.random.normal(next(random), (1, 1, heads, width))
    weights = jax.random.normal(next(random), (1, 1, heads))
    q = jax.random.normal(next(random), (1, 1, config.num_attention_heads, config.head_dim))
    scores = compiled(
        lambda q, weights, stack: index_scores_xla(q, weights, Entries(stack, first), num_keys),
        index_q,
        weights,
        held["csa", "keys"],
    )

    def attend(q: jax.Array, stack: Any) -> jax.Array:
        entries = Entries(stack, first).prefix(num_hca, q.dtype)
        visible = jnp.ones((1, 1, num_hca), bool)
        return softmax_attention(q, entries, visible, jnp.zeros(q.shape[2]))

    found = {
        "index scores": scores,
        "HCA attention": compiled(attend, q, held["hca", "entries"]),
    }
    if num_keys > config.index_topk:
        top_k = compiled(lambda x: jax.lax.top_k(x, config.index_topk)[1], scores())
        found = {"index scores": scores, "top-k": top_k, "HCA attention": found["HCA attention"]}
    return found


def bytes_read(config: ModelConfig, context: int, key: int, entry: int) -> dict[str, int]:
    """Term -> bytes one layer of it reads; `key` and `entry` are those of one key and one entry."""
    num_keys = context // config.csa_ratio
    top_k = SCORE_BYTES * num_keys if num_keys > config.index_topk else 0
    hca = entry * (context // config.hca_ratio)
    return {"index scores": key * num_keys, "top-k": top_k, "HCA attention": hca}


def term_milliseconds(
    config: ModelConfig, cache: Cache, contexts: tuple[int, ...], runs: int
) -> dict[str, dict[str, float]]:
    """Term -> context -> median milliseconds of CPU time; a term that a context does not have takes 0."""
    taken: dict[str, dict[str, float]] = {"index scores": {}, "top-k": {}, "HCA attention": {}}
    for context in contexts:
        operations = terms(config, cache, context)
        for name, by in taken.items():
            by[str(context)] = _cpu_milliseconds(operations[name], runs) if name in operations else 0.0
    return taken


def _cpu_milliseconds(operation: Callable[[], jax.Array], runs: int) -> float:
    jax.block_until_ready(operation())
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        jax.block_until_ready(operation())
        seconds.append(time.process_time() - start)
    return 1000 * statistics.median(seconds)


def explained(growth: dict[str, Any], step: dict[str, float]) -> str:
    """Table of the terms, and how much of the whole step's growth they account for."""
    contexts = list(step)
    first, last = contexts[0], contexts[-1]
    rows = []
    for name, by in growth["milliseconds"].items():
        read = growth["bytes"][name]
        rows.append(
            [name, *(f"{by[c]:.2f} ms, {read[c] / 2**20:.2f} MiB" for c in contexts)]
            + [f"{by[last] - by[first]:+.2f} ms"]
        )
    gains = {name: by[last] - by[first] for name, by in growth["milliseconds"].items()}
    whole, parts = step[last] - step[first], sum(gains.values())
    read = {c: sum(by[c] for by in growth["bytes"].values()) for c in contexts}
    largest = max(gains, key=lambda name: gains[name])
    text = (
        f"Why the {growth['format']} step grows: its growing terms on their own, CPU time, medians of "
        f"{growth['runs']}, with the bytes each reads.\n\n"
        + study_record.table(["term", *(f"{int(c):,} tokens" for c in contexts), "growth"], rows)
        + f"\nFrom {int(first):,} to {int(last):,} tokens the step's CPU time goes from {step[first]:.2f} to "
        f"{step[last]:.2f} ms ({whole:+.2f} ms), that of these terms by {parts:+.2f} ms; the largest is "
        f"{largest} ({gains[largest]:+.2f} ms). They read {read[first] / 2**20:.2f} MiB at first and "
        f"{read[last] / 2**20:.2f} MiB at last ({read[last] / read[first]:.0f} times)"
    )
    if min(whole, parts) <= 0:
        return text + "; the times are too noisy to divide.\n"
    rate = (read[last] - read[first]) / whole / 1e6
    return text + f": {parts / whole:.0%} of the growth, {rate:.2f} GB read for every second of it.\n"
