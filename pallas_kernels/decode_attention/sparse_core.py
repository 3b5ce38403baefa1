"""Entry to the SparseCore: chosen entries fetched ahead of the attention. Compiled, never run on a chip.

Nothing imports this module but who wants it: `decode_attention(..., blocks=sparse_core.blocks(...))`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arithmetic import round_up
from pallas_kernels.decode_attention import kernel_sparse_core, kernel_tpu_fetched, stored, tuning


def attend(
    g: tuning.Geometry,
    q: jax.Array,
    view: jax.Array,
    ring: stored.Entries,
    sink: jax.Array,
    repeat: jax.Array,
    entries: jax.Array,
    index: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """As `kernel_tpu_gather.gather`, with each list in one chunk; `entries` are plain numbers.

    Raises:
        RuntimeError: for a chip without SparseCores (v5e).
    """
    rows = _fetch(entries, repeat[0], index.reshape(g.batch, -1), interpret)
    return kernel_tpu_fetched.attend_fetched(g, q, view, ring, sink, repeat, rows, index, interpret=interpret)


def _fetch(entries, repeat, index, interpret):
    """The entries that the lists i32[B, T * K] name, one list after the other; entry 0 for -1."""
    repeats, batch, size, width = entries.shape
    first = (repeat * batch + jnp.arange(batch, dtype=jnp.int32)) * size
    row = (first[:, None] + jnp.maximum(index, 0)).reshape(-1)
    table = entries.reshape(repeats * batch * size, width)
    if entries.dtype == jnp.float32:
        return kernel_sparse_core.gather_rows(table, row, interpret=interpret)
    return kernel_sparse_core.gather_halves(table, row, interpret=interpret)


def blocks(
    *, heads: int, width: int, slots: int, num_chosen: int, itemsize: int, quantized_ring: bool = False
) -> tuning.DecodeBlocks:
    """Blocks for entries fetched by the SparseCore: queries by ROWS_A_STEP, as many as fit in VMEM.

    Nothing chooses this path by itself: no SparseCore kernel here has run on a chip, and its time is unknown.
    What is known are the bytes of HBM. A fetched row is read, in bfloat16 with its neighbour, written and
    read again: 3 K Dh numbers of 4 bytes a query, or 4 K Dh of 2.

    Args:
        heads: H; width: Dh; slots: M; num_chosen: K; itemsize: bytes of a number of q;
        quantized_ring: whether the ring is stored in fp8.

    Raises:
        ValueError: if not even one query fits.
    """
    sizes = dict(heads=heads, width=width, slots=slots, num_chosen=round_up(num_chosen, tuning.LIST_ROWS))
    sizes |= dict(itemsize=itemsize, quantized_ring=quantized_ring)
    queries = max(1, tuning.ROWS_A_STEP // heads)
    while vmem_bytes(queries=queries, **sizes) > tuning.VMEM_LIMIT:
        if queries == 1:
            raise ValueError(
                f"no query fits in {tuning.VMEM_LIMIT} bytes: {heads=} {width=} {slots=} {num_chosen=}"
            )
        queries //= 2
    return tuning.DecodeBlocks(queries, tuning.LANES, gather=True, ahead=attend)


def vmem_bytes(
    *, queries: int, heads: int, width: int, slots: int, num_chosen: int, itemsize: int, quantized_ring: bool
) -> int:
    """VMEM of one step of attention over fetched entries with so many queries, in bytes."""
    row, slots, lanes = width * itemsize, round_up(slots, tuning.SUBLANES), tuning.LANES
    tile = heads * row  # q or o
    small = 4 * 8 * (lanes + round_up(heads, lanes) + round_up(num_chosen, lanes))  # view, lse, index
    ring = round_up(slots, lanes) * (width + 2 * lanes) if quantized_ring else slots * row
    # As in `tuning.Geometry.vmem_bytes`.
    in_flight = heads * ((slots + num_chosen) * (8 + itemsize) + 4 * width)
    in_flight += slots * (3 * 4 * width + row) if quantized_ring else 0
    return queries * (2 * (2 * tile + small + ring + num_chosen * row) + in_flight)
