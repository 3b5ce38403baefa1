"""How `decode_attention` picks its path and its block sizes: legality, a VMEM formula, then a choice.

Cycle counts here are a compiler's schedule (libtpu, v6e and tpu7x agree within a fifth), not measurements.
"""

import dataclasses
from collections.abc import Callable

import jax

from pallas_kernels.arithmetic import cdiv, round_up

LANES = 128
SUBLANES = 16  # rows of a bfloat16 tile; whole tiles of every dtype
LIST_ROWS = 16
"""Lists of chosen entries are padded to a multiple of it: whole tiles of every dtype."""

VMEM_LIMIT = 56 * 2**20
"""What a kernel may ask for, in bytes; the smallest VMEM of a supported core is 64 MiB (v5p, tpu7x)."""


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeBlocks:
    """Tile sizes and path. Changes speed only, never the mathematics."""

    sequences: int  # of one grid step; with `ahead` queries
    entries: (
        int  # compressed entries of one grid step, of each sequence; with `gather` of one chunk of a list
    )
    gather: bool = False  # chosen entries are fetched one by one; else all are read and masked
    # With `gather`: what fetches whole lists and then attends, `sparse_core.attend`. Only by hand.
    ahead: Callable[..., tuple[jax.Array, jax.Array]] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.sequences < 1:
            problems.append(f"sequences={self.sequences} must be at least 1")
        if self.entries <= 0 or self.entries % LANES:
            problems.append(f"entries={self.entries} must be a positive multiple of {LANES}")
        if self.ahead and not self.gather:
            problems.append("ahead needs gather")
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """One call cut into blocks."""

    batch: int  # B
    queries: int  # T
    heads: int  # H
    width: int  # Dh
    slots: int  # M
    num_entries: int  # S; 0 without entries
    itemsize: int  # bytes of an element of q, and of a ring and entries that are not in fp8
    masked: bool  # whether there is a choice of entries
    quantized: bool  # whether entries are stored in fp8
    quantized_ring: bool  # whether the ring is
    blocks: DecodeBlocks

    @property
    def rows(self) -> int:
        """Rows of one sequence: every head of every query."""
        return self.queries * self.heads

    @property
    def sequences(self) -> int:
        """Sequences a grid step."""
        return min(self.blocks.sequences, self.batch)

    @property
    def num_groups(self) -> int:
        return cdiv(self.batch, self.sequences)

    @property
    def entries(self) -> int:
        """Entries a block; a lone block may reach beyond the last entry."""
        return min(self.blocks.entries, round_up(self.num_entries, LANES))

    @property
    def num_entry_blocks(self) -> int:
        return cdiv(self.num_entries, self.entries) if self.num_entries else 0

    def vmem_bytes(self) -> int:
        """VMEM of one step of the streaming kernel, in bytes. Operands and results are double buffered."""
        row = self.width * self.itemsize
        slots = round_up(self.slots, SUBLANES)
        padded_queries = round_up(self.queries, 8)
        tile = self.rows * row  # q or o
        view = 4 * padded_queries * LANES
        lse = 4 * padded_queries * round_up(self.heads, LANES)
        chosen = round_up(self.queries, 32) * self.entries if self.masked else 0
        stored = self.entries * (self.width + LANES if self.quantized else row)  # e4m3, rotary, scales
        lanes = round_up(self.slots, LANES)
        ring = lanes * (self.width + 2 * LANES) if self.quantized_ring else slots * row
        operands = 2 * (2 * tile + view + lse + chosen + ring + stored)
        columns = 2 * 4 * self.queries * round_up(self.heads, 8) * LANES  # running maximum and sum
        kept = columns + 4 * self.rows * self.width if self.num_entry_blocks > 1 else 0
        # Logits and weights in float32, weights rounded, the product with the values.
        in_flight = self.rows * ((slots + self.entries) * (8 + self.itemsize) + 4 * self.width)
        in_flight += 2 * self.entries * row if self.quantized else 0  # decoded entries
        # Values, scales and rotated channels in float32, then the rows.
        in_flight += slots * (3 * 4 * self.width + row) if self.quantized_ring else 0
        return self.sequences * (operands + kept + in_flight)


ROWS_A_STEP = 512
"""Rows (heads of queries) of all sequences of a step: enough independent chains to fill the latencies. Half
as many where sequences go through several blocks of entries, which they do one by one: more would only make
the program longer, and its compilation."""

LONGEST_BLOCK = 1024  # entries


def choose_blocks(
    *,
    queries: int,
    heads: int,
    width: int,
    slots: int,
    num_entries: int,
    num_chosen: int | None,
    itemsize: int,
    in_rows: bool = False,
    quantized: bool = False,
    quantized_ring: bool = False,
) -> DecodeBlocks:
    """Sequences by ROWS_A_STEP, then the longest block of entries that fits in VMEM.

    Args:
        queries: T; heads: H; width: Dh; slots: M; num_entries: S, 0 without entries;
        num_chosen: K, or None without a choice; itemsize: bytes of a number of q;
        in_rows: whether entries are `Fp8Rows`, which are always gathered; quantized: whether they are
        `Fp8Entries`, which never are; quantized_ring: whether the ring is stored in fp8.

    Raises:
        ValueError: if not even the smallest block fits.
    """
    rows = queries * heads
    if in_rows or (
        not quantized
        and num_chosen is not None
        and gather_pays(
            queries=queries, rows=rows, num_entries=num_entries, num_chosen=num_chosen, itemsize=itemsize
        )
    ):
        return DecodeBlocks(1, LANES, gather=True)
    share = 1 if num_entries <= LONGEST_BLOCK else 2
    sequences = max(1, ROWS_A_STEP // share // rows)
    while True:
        for entries in (LONGEST_BLOCK, 512, 256, 128):
            blocks = DecodeBlocks(sequences, entries)
            masked, formats = num_chosen is not None, (quantized, quantized_ring)
            g = Geometry(
                sequences, queries, heads, width, slots, num_entries, itemsize, masked, *formats, blocks
            )
            if g.vmem_bytes() <= VMEM_LIMIT:
                return blocks
        if sequences == 1:
            raise ValueError(
                f"no legal block fits in {VMEM_LIMIT} bytes: {queries=} {heads=} {width=} {slots=}"
            )
        sequences //= 2


START = 8.4
"""Scalar cycles to start the copy of one row, its address in a tiled array before all (schedule of v6e at 64
and 128 heads; 9 on tpu7x). The arithmetic between the copies fits in."""

FETCH = 1.1
"""Cycles in which HBM delivers a bfloat16 row of 512 (v6e; 0.6 on tpu7x)."""

COMPUTE = 0.7 / 64
"""Cycles a row of q and a key: both products and the softmax."""


START_FP8 = 14
"""Scalar cycles to start the two copies of an entry in rows (v6e; 14.3 on tpu7x)."""

DECODE_FP8 = 2
"""Cycles to decode an fp8 entry where all are read (v6e; 1.1 on tpu7x)."""


def rows_pay(*, rows: int, num_entries: int, num_chosen: int) -> bool:
    """Whether a cache should keep fp8 entries, of which so many are chosen, as rows: see `gather_pays`.

    For one query of 64 heads and K = 512 the switch lies at S = 3584 entries, 14,336 tokens of context.
    """
    return num_chosen * START_FP8 < num_entries * max(DECODE_FP8, rows * COMPUTE)


def gather_pays(*, queries: int, rows: int, num_entries: int, num_chosen: int, itemsize: int) -> bool:
    """Whether fetching the chosen entries one by one beats reading and masking all of them.

        gather:  T K START
        masked:  S max(FETCH itemsize / 2, T H COMPUTE)

    in cycles a sequence, with rows = T H. For one query of 64 heads and K = 512 in bfloat16 the switch lies
    at S = 3910 entries; T queries move it up, because their lists are fetched one by one and their masks
    share one stream. An odd number of bfloat16 entries has no pairs: never.
    """
    if num_entries * itemsize % 4:
        return False
    gather = num_chosen * queries * START
    masked = num_entries * max(FETCH * itemsize / 2, rows * COMPUTE)
    return gather < masked
