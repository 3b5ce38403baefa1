"""The attention cases of `tpu_cases.py`: training and prefill, and decoding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import ModelConfig
from experiments.tpu_case import Case, Grid, Kernel, Program, array, f32, gradients, i32, us

# --- hybrid attention ----------------------------------------------------------------------------------


def hybrid_attention_cases(c: ModelConfig) -> list[Case]:
    heads, width, window = c.num_attention_heads, c.head_dim, c.sliding_window

    def visible(batch: int, length: int, context: int, ratio: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and number of visible entries of each query: the last `length` tokens of `context`."""
        position = np.broadcast_to(np.arange(context - length, context, dtype=np.int32), (batch, length))
        return position, (position + 1) // ratio

    def build(
        batch: int, length: int, context: int, ratio: int | None, masked: bool, backward: bool
    ) -> Program:
        from pallas_kernels.hybrid_attention import hybrid_attention, tuning, visibility

        per_query, size = i32(batch, length), context // ratio if ratio else 0
        shapes = dict(
            q=array(batch, length, heads, width), line=array(batch, window - 1 + length, width),
            position=per_query, sink=f32(heads),
        )  # fmt: skip
        floats, nothing = ["q", "line", "sink"], np.zeros(1, np.int32)
        ranges, turned, visits = (nothing, nothing), (nothing, nothing), 0
        blocks = tuning.choose_blocks(heads=heads, width=width, window=window, itemsize=2, masked=masked)
        g = tuning.Geometry(batch, length, heads, width, window, size, 2, masked, blocks)
        if ratio:
            shapes |= dict(entries=array(batch, size, width), lo=per_query, hi=per_query)
            floats.append("entries")
            position, hi = visible(batch, length, context, ratio)
            view = visibility.views(jnp.asarray(position), None, jnp.asarray(hi), window, size, g.queries)
            blocks_seen = visibility.entry_blocks_of_queries(view, g.queries, g.entries)
            seen_by = visibility.query_blocks_of_entries(blocks_seen, batch, g.num_entry_blocks)
            ranges, turned = (tuple(np.asarray(x) for x in pair) for pair in (blocks_seen, seen_by))
            visits = int(np.maximum(ranges[1] - ranges[0] + 1, 0).sum())
        if masked:
            shapes["selected"] = array(batch, length, size, dtype=jnp.bool_)
        op = functools.partial(hybrid_attention, window=window)

        def by_query(grid: Grid) -> tuple[float, ...]:
            """The window's step, those with visible entries, the last; with one step there is no choice."""
            if not ratio:
                return ()
            return 1 / grid[2], visits / math.prod(grid), 1 / grid[2]

        def line(grid: Grid) -> tuple[float, ...]:
            seen = visibility.LineBlocks(g.line, g.queries, g.num_query_blocks, window)
            visited = sum(max(0, 1 + seen.last(j) - seen.first(j)) for j in range(g.num_line_blocks))
            return 1 / grid[2], batch * visited / math.prod(grid), 1 / grid[2]

        def entries(grid: Grid) -> tuple[float, ...]:
            return 1 / grid[2], visits / math.prod(grid), 1 / grid[2]

        if not backward:
            return Program(op, shapes, {"hybrid_attention_forward": Kernel(by_query, prefetch=ranges)})
        kernels = {
            "hybrid_attention_d_query": Kernel(by_query, prefetch=ranges),
            "hybrid_attention_d_line": Kernel(line, prefetch=ranges),
        }
        if ratio:
            kernels["hybrid_attention_d_entries"] = Kernel(entries, prefetch=turned)
        return Program(*gradients(op, shapes, floats), kernels)

    def case(
        kind: str, name: str, batch: int, length: int, context: int, *, backward=False, **figures
    ) -> Case:
        ratio = {"window": None, "HCA": c.hca_ratio, "CSA": c.csa_ratio}[kind]
        keys = batch * length * window
        if ratio:
            keys += int(
                visible(batch, length, context, ratio)[1].sum()
            )  # CSA masks: all of them are computed
        row = batch * length * heads * width
        # Backward: q, do, o and dq, and q and do again for one or two key gradients, each at least once.
        moved = 2 * row * ((4 + 2 * (1 + bool(ratio))) if backward else 2)
        # The contract's figure leaves out the keys, which are most of a decode step: once each at least.
        moved += 2 * batch * (window - 1 + length + (context // ratio if ratio else 0)) * width
        label = f"hybrid_attention {kind} {name}" + (" backward" if backward else "")
        arguments = (batch, length, context, ratio, kind == "CSA", backward)
        flops = (14 if backward else 4) * keys * heads * width
        return Case(label, lambda: build(*arguments), lambda: (flops, moved), **figures)

    prefill = "prefill 2048 at 64K", 1, 2048, 2**16
    return [
        case("window", *prefill, target=us(230, 150), peer=us(348.4, 235.4)),
        case("window", *prefill, backward=True),
        case("HCA", *prefill, target=us(550, 420), peer=us(859.1, 848.0)),
        case("HCA", *prefill, backward=True),
        # The peer gathers 512 entries a query; these mask all 2048, and all 16384.
        case("CSA", "prefill 2048 at 8K, masked", 1, 2048, 2**13, peer=us(1881.6, 835.2)),
        case("CSA", "prefill 2048 at 64K, masked", 1, 2048, 2**16),
    ]


def gathered_attention_cases(c: ModelConfig) -> list[Case]:
    """The chosen entries of CSA alone: the window, the list and the merge are rows or estimates of others."""
    length, size, chosen = 2048, 2**16 // c.csa_ratio, c.index_topk
    heads, width = c.num_attention_heads, c.head_dim

    def build() -> Program:
        from pallas_kernels.hybrid_attention import gathered_attention

        shapes = dict(
            q=array(1, length, heads, width), entries=array(1, size, width), index=i32(1, length, chosen)
        )
        # The first step also fetches its own query's rows.
        kernel = Kernel(
            when=lambda grid: (1 / grid[0],),
            prefetch=(np.zeros(1, np.int32),),
            copied_bytes=length * chosen * 2 * width * 2,  # bfloat16 rows come in pairs
        )
        return Program(gathered_attention, shapes, {"gathered_attention_forward": kernel})

    flops = 4 * length * chosen * heads * width
    moved = 2 * length * width * (2 * chosen + 2 * heads)
    return [Case(f"gathered_attention CSA prefill {length} at 64K", build, lambda: (flops, moved))]


# --- decode attention ----------------------------------------------------------------------------------


def decode_attention_cases(c: ModelConfig) -> list[Case]:
    batch, context, repeats = 64, 2**16, 1
    heads, width = c.num_attention_heads, c.head_dim
    slots = {False: c.sliding_window, True: c.sliding_window + 8}
    num_entries = {"window": 0, "HCA": context // c.hca_ratio, "CSA": context // c.csa_ratio}
    chosen = c.index_topk

    def in_fp8(*rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The three arrays of `Fp8Entries`."""
        still = width - c.qk_rope_head_dim
        return {
            "values": array(*rows, still, dtype=jnp.float8_e4m3fn),
            "scales": array(*rows, 8, dtype=jnp.uint8),
            "rotary": array(*rows, c.qk_rope_head_dim),
        }

    def build(kind: str, fp8: bool, sparse_core: bool, in_rows: bool) -> Program:
        from pallas_kernels.decode_attention import decode_attention, tuning
        from pallas_kernels.formats import entry_rows
        from pallas_kernels.formats.entries import Fp8Entries
        from pallas_kernels.formats.entry_rows import Fp8Rows

        size = num_entries[kind]
        shapes = dict(q=array(batch, 1, heads, width), position=i32(batch, 1), sink=f32(heads), repeat=i32())
        stored = {"ring": (repeats, batch, slots[fp8])}
        if size:
            stored["entries"] = (repeats, batch, size)
        for name, rows in stored.items():
            parts = {f"{name}_{part}": x for part, x in in_fp8(*rows).items()}
            if in_rows and name == "entries":
                empty = functools.partial(
                    entry_rows.empty, *rows, entry_rows.Layout(width, c.qk_rope_head_dim)
                )
                one, shared = jax.tree.leaves(jax.eval_shape(empty))
                parts = {"entries_words": one, "entries_rest": shared}
            shapes |= parts if fp8 else {name: array(*rows, width)}
        first_repeat = np.zeros(1, np.int32)
        if kind == "CSA":
            shapes["index"] = i32(batch, 1, chosen)
        elif size:
            shapes["hi"] = i32(batch, 1)
        rows = batch * chosen * width * 2
        blocks = None
        if sparse_core:
            from pallas_kernels.decode_attention import sparse_core as ahead

            blocks = ahead.blocks(heads=heads, width=width, slots=slots[fp8], num_chosen=chosen, itemsize=2)
            # The SparseCore reads rows with their neighbours, and writes rows; its cycles are not known.
            kernel = Kernel(prefetch=(first_repeat,), copied_bytes=3 * rows)
            name = "decode_attention_fetched"
        elif kind == "CSA" and (in_rows or not fp8):
            # The first step of a part also fetches its own query's rows.
            kernel = Kernel(
                when=lambda grid: (1 / grid[1],),
                prefetch=(first_repeat,),
                # Bfloat16 rows come in pairs; an fp8 row of 512 bytes with one that seven share.
                copied_bytes=batch * chosen * 2 * width if in_rows else 2 * rows,
            )
            name = "decode_attention_gather"
        else:
            prefetch = (first_repeat, np.full(batch, size, np.int32))
            # Every block is full: the loops that clear rows behind the last entry have nothing to do.
            # A core of a v5p runs the whole body under a condition that holds.
            kernel = Kernel(when=lambda grid: 1.0, trips=0, prefetch=prefetch)
            if size > 1024:  # several blocks: the first also attends to the ring, the last one finishes
                together = tuning.choose_blocks(
                    queries=1, heads=heads, width=width, slots=slots[fp8], num_entries=size, itemsize=2,
                    num_chosen=chosen if kind == "CSA" else None, quantized=fp8, quantized_ring=fp8,
                ).sequences  # fmt: skip
                kernel = Kernel(functools.partial(several_blocks, together), trips=0, prefetch=prefetch)
            name = "decode_attention_stream"

        def step(**arrays):
            if in_rows:
                words, rest = arrays.pop("entries_words"), arrays.pop("entries_rest")
                arrays["entries"] = Fp8Rows(words, rest, c.qk_rope_head_dim)
            for name in set(stored) - arrays.keys() if fp8 else ():
                arrays[name] = Fp8Entries(*(arrays.pop(f"{name}_{part}") for part in Fp8Entries._fields))
            return decode_attention(**arrays, window=c.sliding_window, blocks=blocks)

        return Program(step, shapes, {name: kernel})

    def several_blocks(together: int, grid: Grid) -> tuple[float, ...]:
        """The first block, each sequence's others, the last block."""
        steps = grid[1]
        return (1 / steps, *[1 - 1 / steps] * together, 1 / steps)

    def case(
        kind: str, *, fp8: bool = False, sparse_core: bool = False, in_rows: bool = False, **figures
    ) -> Case:
        picked = kind == "CSA" and (in_rows or not fp8)
        keys = slots[fp8] + (chosen if picked else num_entries[kind])
        flops = 4 * batch * heads * keys * width
        moved = batch * (keys * (width + c.qk_rope_head_dim + 8 if fp8 else 2 * width) + 4 * heads * width)
        label = f"decode_attention {kind} decode {batch} at 64K" + (", FP8" if fp8 else "")
        label += ", fetched by the SparseCore" if sparse_core else ""
        label += " masked" if kind == "CSA" and not picked else ""
        built = functools.partial(build, kind, fp8, sparse_core, in_rows)
        return Case(label, built, lambda: (flops, moved), **figures)

    return [
        case("window", target=us(15, 8), peer=us(29.0, 25.8)),
        case("HCA", target=us(45, 25), peer=us(120.8, 105.3)),
        # The peer's figure leaves out its gather, which runs on the sparse core.
        case("CSA", target=us(40, 18), peer=us(58.8, 26.1)),
        # The bytes of the fetch count, its cycles do not: nothing tells them.
        case("CSA", sparse_core=True, target=us(40, 18), peer=us(58.8, 26.1)),
        # Ring, as long as the cache's, and entries in FP8.
        case("window", fp8=True),
        case("HCA", fp8=True),
        case("CSA", fp8=True, in_rows=True),
        case("CSA", fp8=True),
    ]
