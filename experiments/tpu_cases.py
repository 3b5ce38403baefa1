"""What `tpu_cycles.py` compiles: kernels at V4's shapes, their documented cost, and the figures to beat.

Append new cases to a family, and new families to `FAMILIES`. Kernels are imported when a case is built, so
that a family that does not import costs its own rows only.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from dsv4_jax.config import ModelConfig
from experiments.tpu_attention_cases import (
    decode_attention_cases,
    gathered_attention_cases,
    hybrid_attention_cases,
)
from experiments.tpu_block_matmul_cases import block_matmul_cases
from experiments.tpu_case import Case, Kernel, Program, array, f32, gradients, i32, once, once_a_row, us
from experiments.tpu_expert_cases import expert_cases
from pallas_kernels.arithmetic import cdiv

# --- hyper-connections ---------------------------------------------------------------------------------


def hyper_connection_cases(c: ModelConfig) -> list[Case]:
    n, d, rows = c.hc_mult, c.hidden_size, c.hc_mult * (c.hc_mult + 2)
    settings = dict(num_iters=c.hc_sinkhorn_iters, hc_eps=c.hc_eps, norm_eps=c.rms_norm_eps)
    arguments = {
        "pre": ("streams", "fn", "base", "scale", "norm_weight"),
        "post": ("streams", "update", "maps"),
        "post_pre": ("streams", "update", "maps", "fn", "base", "scale", "norm_weight"),
        "collapse": ("streams", "fn", "base", "scale"),
    }

    def build(name: str, tokens: int, backward: bool) -> Program:
        from pallas_kernels import hyper_connection
        from pallas_kernels.hyper_connection import stream_maps

        every = dict(
            streams=array(tokens, n, d), update=array(tokens, d), maps=f32(tokens, rows),
            fn=f32(rows, n, d), base=f32(rows), scale=f32(3), norm_weight=f32(d),
        )  # fmt: skip
        if name == "collapse":
            every |= dict(fn=f32(n, n, d), base=f32(n), scale=f32(1))
        shapes = {key: every[key] for key in arguments[name]}
        wanted = {"post": (), "collapse": ("hc_eps", "norm_eps")}.get(name, settings)
        settled = functools.partial(getattr(hyper_connection, name), **{key: settings[key] for key in wanted})

        def op(**arrays):
            if "maps" in arrays:
                arrays["maps"] = stream_maps.of_columns(arrays["maps"], n)
            return settled(**arrays)

        if backward:
            op, shapes = gradients(op, shapes, tuple(shapes))
        kernel = f"hyper_connection_{name}" + ("_backward" if backward else "")
        return Program(op, shapes, {kernel: Kernel(when=once)})  # `fn` is laid out on the first step

    def case(name: str, tokens: int, flops: int, streams: int, *, backward=False, **figures) -> Case:
        weights = {"post": 0, "collapse": n}.get(name, rows) * 4 * n * d * (2 if backward else 1)
        label = f"hyper_connection {name} {tokens}" + (" backward" if backward else "")
        moved = 2 * tokens * streams * d + weights
        return Case(label, lambda: build(name, tokens, backward), lambda: (tokens * flops, moved), **figures)

    post, pre = n * d * (2 * n + 2), 2 * n * d * (rows + 2) + 6 * d
    both_backward = n * d * (6 * n + 6) + n * d * (4 * rows + 14)
    return [
        case("pre", 64, pre, n + 1, peer=us(3.0, 1.5)),
        case("pre", 2048, pre, n + 1, peer=us(74.6, 49.6)),
        case("post", 64, post, 2 * n + 1, peer=us(2.9, 1.9)),
        case("post", 2048, post, 2 * n + 1, peer=us(92.2, 62.7)),
        case("post_pre", 64, post + pre, 2 * n + 2, target=us(3.5, 2.3), peer=us(5.1, 3.4)),
        case("post_pre", 2048, post + pre, 2 * n + 2, target=us(110, 70), peer=us(154.8, 103.0)),
        case("post_pre", 2048, both_backward, 3 * n + 3, backward=True),
        case("collapse", 64, 2 * n * d * (n + 2), n + 1),
        case("collapse", 2048, 2 * n * d * (n + 2), n + 1),
    ]


# --- compressor ----------------------------------------------------------------------------------------


def compressor_cases(c: ModelConfig) -> list[Case]:
    def build(tokens: int, ratio: int, branches: int, width: int, backward: bool) -> Program:
        from pallas_kernels.compressor import compressor

        rows, angles = array(1, tokens, branches, width), f32(1, tokens // ratio, c.qk_rope_head_dim // 2)
        ape, norm = f32(ratio, branches, width), f32(width)
        shapes = dict(kv=rows, gate=rows, ape=ape, norm=norm, cos=angles, sin=angles)
        op = functools.partial(compressor, eps=c.rms_norm_eps)
        if backward:
            program = gradients(op, shapes, ("kv", "gate", "ape", "norm"))
            return Program(*program, {"compressor_backward": Kernel(when=once_a_row)})
        return Program(op, shapes, {"compressor_forward": Kernel()})

    def cost(tokens: int, ratio: int, branches: int, width: int, backward: bool) -> tuple[float, float]:
        from pallas_kernels.compressor.tuning import HALO_ROWS, choose_blocks

        entries, numbers = tokens // ratio, tokens * branches * width
        block = choose_blocks(entries, ratio, branches, width, 2, backward=backward).entries
        extra = 1024 * entries
        if branches == 2:
            extra += 512 * entries + 2 * HALO_ROWS * width * 2 * cdiv(entries, block)
        moved = (4 if backward else 2) * numbers * 2 + entries * width * 2 + extra
        return (13 if backward else 7) * numbers, moved

    def case(kind: str, tokens: int, *, backward=False, **figures) -> Case:
        sizes = {
            "CSA": (c.csa_ratio, 2, c.head_dim),
            "indexer": (c.csa_ratio, 2, c.index_head_dim),
            "HCA": (c.hca_ratio, 1, c.head_dim),
        }[kind]
        label, work = (
            f"compressor {kind} {tokens}" + (" backward" if backward else ""),
            (tokens, *sizes, backward),
        )
        return Case(label, lambda: build(*work), lambda: cost(*work), **figures)

    return [
        case("CSA", 64, peer=us(6.2, 4.9)),
        case("CSA", 2048, target=us(60, 45), peer=us(191.1, 151.4)),
        case("CSA", 2048, backward=True),
        case("indexer", 2048, peer=us(149.3, 117.4)),
        case("HCA", 2048),
        case("HCA", 2048, backward=True),
    ]


# --- indexer -------------------------------------------------------------------------------------------


def indexer_cases(c: ModelConfig) -> list[Case]:
    heads, width = c.index_n_heads, c.index_head_dim

    def choose(backward: bool, *sizes: int):
        from pallas_kernels.indexer import op, tuning

        batch, length, size = sizes
        choice = tuning.choose_gradient_blocks if backward else tuning.choose_blocks
        return choice(batch, length, heads, width, size, 2, vmem_budget=op.VMEM_BUDGET)

    def select_trips(tile_chunks: int, tiles: int) -> list[float]:
        """Loops of the selection whose bounds follow what is visible: here everything, without ties."""
        bits = [4.0, *[tiles] * 4]  # four passes over the tiles, four times: no row is decided early
        tied = [tiles] * 3
        #      score; behind the end; count; upper half; narrow; lower half; ties; write; behind the end
        return [tile_chunks, 0, tiles, *bits, tiles, *bits, *tied, tiles, 0]

    def build(work: str, *sizes: int) -> Program:
        from pallas_kernels.indexer import index_scores, index_select

        batch, length, size = sizes
        per_query = i32(batch, length)
        shapes = dict(
            q=array(batch, length, heads, width), weights=f32(batch, length, heads),
            keys=array(batch, size, width), lo=per_query, hi=per_query,
        )  # fmt: skip
        if work == "backward":
            kernels = {f"index_scores_bwd_{x}": Kernel(when=once_a_row) for x in ("queries", "keys")}
            return Program(*gradients(index_scores, shapes, ("q", "weights", "keys")), kernels)
        blocks = choose(False, *sizes)
        chunks, blocks_of_rows = blocks.keys // blocks.chunk, cdiv(batch * length, blocks.rows)
        prefetch = (np.zeros(1, np.int32), np.full(blocks_of_rows, size, np.int32))
        if work == "scores":
            kernel = Kernel(lambda grid: (1 / grid[1],), [chunks], prefetch)  # queries are laid out once
            return Program(index_scores, shapes, {"index_scores_fwd": kernel})
        # Queries are laid out before the first tile, the choice follows the last; the third is for ties.
        trips = select_trips(chunks, cdiv(size, blocks.keys))
        kernel = Kernel(lambda grid: (1 / grid[1], 1 / grid[1], 0.0), trips, prefetch)
        return Program(functools.partial(index_select, k=c.index_topk), shapes, {"index_select_fwd": kernel})

    def cost(work: str, *sizes: int) -> tuple[float, float]:
        batch, length, size = sizes
        blocks, pairs = choose(work == "backward", *sizes), batch * length * size
        flops = 2 * pairs * heads * (width + 1)
        result = pairs * (blocks.mask_bytes if work == "select" else 4)
        queries = batch * length * heads * (2 * width + 4)
        moved = queries + result + 2 * batch * cdiv(length, blocks.queries) * size * width
        return (2.5 * flops, 2 * moved) if work == "backward" else (flops, moved)

    def case(work: str, name: str, *sizes: int, **figures) -> Case:
        label = f"indexer {work} {name}"
        return Case(label, lambda: build(work, *sizes), lambda: cost(work, *sizes), **figures)

    at_64k, at_8k = 2**16 // c.csa_ratio, 2**13 // c.csa_ratio
    return [
        # The peer chooses outside of its kernel, on v6e in 236 us; on tpu7x that part is not known.
        case("select", "decode 64 at 64K", 64, 1, at_64k, target=us(260, 150), peer=us(505)),
        case("select", "prefill 2048 at 64K", 1, 2048, at_64k),
        case("scores", "prefill 2048 at 64K", 1, 2048, at_64k, peer=us(1866.0, 1181.3)),
        case("backward", "2048 at 8K", 1, 2048, at_8k),
    ]


# --- linear cross entropy ------------------------------------------------------------------------------


def linear_cross_entropy_cases(c: ModelConfig) -> list[Case]:
    tokens, vocab, d = 4096, c.vocab_size, c.hidden_size

    def build(backward: bool) -> Program:
        from pallas_kernels.linear_cross_entropy import linear_cross_entropy

        shapes = dict(hidden=array(tokens, d), head=array(vocab, d), ids=i32(tokens))
        if backward:
            program = gradients(linear_cross_entropy, shapes, ("hidden", "head"))
            kernels = {f"linear_cross_entropy_{x}": Kernel(when=once_a_row) for x in ("d_hidden", "d_head")}
            return Program(*program, kernels)
        return Program(
            linear_cross_entropy, shapes, {"linear_cross_entropy_forward": Kernel(when=once_a_row)}
        )

    def cost(backward: bool) -> tuple[float, float]:
        from pallas_kernels.linear_cross_entropy.tuning import choose_blocks

        flops, hidden, head = 2 * tokens * vocab * d, 2 * tokens * d, 2 * vocab * d

        def reads(kernel: str) -> tuple[int, int]:
            """How often the kernel reads `head` and `hidden`."""
            blocks = choose_blocks(kernel, tokens, vocab, d, 2, 2, "float32")
            return cdiv(tokens, blocks.tokens), cdiv(vocab, blocks.vocab)

        if not backward:
            return flops, hidden + reads("forward")[0] * head + 12 * tokens
        d_hidden = 2 * hidden + reads("d_hidden")[0] * head
        d_head = 2 * head + reads("d_head")[1] * hidden
        return 4 * flops, d_hidden + d_head + 32 * tokens

    name = f"linear_cross_entropy {tokens}"
    return [
        Case(name, lambda: build(False), lambda: cost(False)),
        Case(f"{name} backward", lambda: build(True), lambda: cost(True)),
    ]


FAMILIES: list[Callable[[ModelConfig], list[Case]]] = [
    hyper_connection_cases,
    compressor_cases,
    indexer_cases,
    hybrid_attention_cases,
    gathered_attention_cases,
    decode_attention_cases,
    linear_cross_entropy_cases,
    block_matmul_cases,
    expert_cases,
]


def cases(config: ModelConfig) -> list[Case]:
    """All cases of a model. The figures to beat are those of the published V4-Flash shapes."""
    found = [case for family in FAMILIES for case in family(config)]
    if config.hidden_size == 4096:
        return found
    return [dataclasses.replace(case, target={}, peer={}) for case in found]
