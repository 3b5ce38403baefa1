"""How `hybrid_attention` picks its block sizes: legality, a VMEM formula, then a choice."""

import dataclasses
import math

from pallas_kernels.arithmetic import cdiv, round_up

LANES = 128
FLOAT32_SUBLANES = 8
SUBLANES = 16  # rows of a bfloat16 tile


@dataclasses.dataclass(frozen=True, slots=True)
class HybridBlocks:
    """Tile sizes of the forward and backward kernels. Changes speed only, never the mathematics."""

    queries: int  # of all heads at once: a tile has queries * H rows
    entries: int  # compressed entries of one step
    line: int  # window entries of one step of the line's gradient
    chunk: int  # queries whose logits are in flight at a time; divides `queries`

    def __post_init__(self) -> None:
        if self.queries <= 0 or self.queries % SUBLANES:
            raise ValueError(f"queries={self.queries} must be a positive multiple of {SUBLANES}")
        if self.chunk <= 0 or self.queries % self.chunk or self.chunk % FLOAT32_SUBLANES:
            raise ValueError(f"chunk={self.chunk} must be a multiple of {FLOAT32_SUBLANES} in {self.queries}")
        for name in ("entries", "line"):
            size = getattr(self, name)
            if size <= 0 or size % LANES:
                raise ValueError(f"{name}={size} must be a positive multiple of {LANES}")


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """One call cut into blocks. A call shorter than a block of queries is one block of exactly its length."""

    batch: int  # B
    length: int  # T
    heads: int  # H
    width: int  # Dh
    window: int  # W
    num_entries: int  # S; 0 without entries
    itemsize: int  # bytes of an element of q, line and entries
    masked: bool  # whether there is a selection
    blocks: HybridBlocks

    @property
    def queries(self) -> int:
        """Queries a block."""
        return min(self.blocks.queries, self.length)

    @property
    def rows(self) -> int:
        """Rows a block: every head of every query."""
        return self.queries * self.heads

    @property
    def chunk(self) -> int:
        """Queries in flight; a call shorter than a block may not divide, and is one chunk then."""
        return self.blocks.chunk if self.queries % self.blocks.chunk == 0 else self.queries

    @property
    def num_query_blocks(self) -> int:
        return cdiv(self.length, self.queries)

    @property
    def entries(self) -> int:
        """Entries a block."""
        return min(self.blocks.entries, round_up(self.num_entries, LANES))

    @property
    def num_entry_blocks(self) -> int:
        return cdiv(self.num_entries, self.entries) if self.num_entries else 0

    @property
    def near(self) -> int:
        """Line places that one block of queries reads: its own and W - 1 before, in whole lanes."""
        return round_up(self.queries + self.window - 1, LANES)

    @property
    def line(self) -> int:
        """Line places a block of the line's gradient."""
        return min(self.blocks.line, round_up(self.length + self.window - 1, LANES))

    @property
    def num_line_blocks(self) -> int:
        return cdiv(self.length + self.window - 1, self.line)

    @property
    def padded_line(self) -> int:
        """Places of the line that the kernels may touch; those behind the call are seen by nobody."""
        last_read = (self.num_query_blocks - 1) * self.queries + self.near
        return max(last_read, self.num_line_blocks * self.line)

    def vmem_bytes(self) -> dict[str, int]:
        """VMEM of one grid step of every kernel, in bytes. Operands and results are double buffered."""
        item, row = self.itemsize, self.width * self.itemsize
        tile = self.rows * row  # q, o, do or dq
        per_query = 4 * self.queries * LANES * cdiv(self.heads, LANES)  # lse or delta
        view = 4 * self.queries * LANES
        selected = self.queries * self.entries if self.masked else 0
        keys = (self.near + self.entries) * row
        widest = max(self.near, self.entries)
        accumulator = 4 * self.rows * self.width
        bias = 4 * self.queries * widest
        in_flight = self.chunk * self.heads
        columns = 2 * 4 * self.rows * LANES  # running maximum and sum; a column fills whole lanes
        sink = 4 * round_up(self.heads, FLOAT32_SUBLANES) * LANES

        forward = 2 * (2 * tile + per_query + view + selected + keys + sink) + bias
        if self.num_entries:
            forward += accumulator + columns
        # Logits and weights in float32, weights rounded, and their product with the values.
        forward += in_flight * (widest * (4 + 4 + item) + 4 * self.width)
        d_query = 2 * (4 * tile + 3 * per_query + view + selected + keys) + accumulator + bias
        # p, dp and ds in float32, ds rounded, and its product with the keys.
        d_query += in_flight * (widest * (3 * 4 + item) + 4 * self.width)

        def d_keys(size: int, chosen: int) -> int:
            results = 2 * (size * row + size * row) + 4 * size * self.width  # keys, gradient; accumulator
            operands = 2 * (2 * tile + 2 * per_query + view + chosen)
            tiles = in_flight * size * (3 * 4 + 2 * item)  # p, dp and ds; p and ds rounded
            return operands + results + 4 * self.queries * size + tiles

        return {
            "forward": forward,
            "d_query": d_query,
            "d_line": d_keys(self.line, 0),
            "d_entries": d_keys(self.entries, selected),
        }


VMEM_LIMIT = 56 * 2**20
"""What a kernel may ask for, in bytes; the smallest VMEM of a supported core is 64 MiB (v5p, tpu7x)."""


CHUNK_ROWS = 1024
"""Rows of logits in flight: enough for the compiler to overlap matmuls and softmax. In the schedules of the
forward kernel (v6e, tpu7x; window, HCA) half as many take 9 to 24 % more cycles, twice as many 3 to 9 %."""


def choose_blocks(*, heads: int, width: int, window: int, itemsize: int, masked: bool) -> HybridBlocks:
    """The most queries and entries a block whose kernels all fit in `VMEM_LIMIT`.

    The matmuls do not care: they stream rows, and keys are padded to the width of the matrix unit anyway.
    More queries share one read of the window and amortise a grid step; more entries at once mean fewer
    passes over the running sums. Fewer leave room in VMEM.
    """
    for queries, entries in ((32, 512), (32, 256), (16, 256), (16, 128)):
        chunk = math.gcd(queries, max(CHUNK_ROWS // heads, FLOAT32_SUBLANES))
        blocks = HybridBlocks(queries, entries, line=256, chunk=max(chunk, FLOAT32_SUBLANES))
        call = Geometry(1, queries, heads, width, window, entries, itemsize, masked, blocks)
        if max(call.vmem_bytes().values()) <= VMEM_LIMIT:
            return blocks
    raise ValueError(f"no legal block fits in {VMEM_LIMIT} bytes: {heads=} {width=} {window=} {itemsize=}")


@dataclasses.dataclass(frozen=True, slots=True)
class GatherBlocks:
    """Tile size of `gathered_attention`. Changes speed only, never the mathematics."""

    chunk: int  # chosen rows that are started, and keys that are computed, in one piece of straight code

    def __post_init__(self) -> None:
        if self.chunk <= 0 or self.chunk % SUBLANES:
            raise ValueError(f"chunk={self.chunk} must be a positive multiple of {SUBLANES}")


@dataclasses.dataclass(frozen=True, slots=True)
class GatherGeometry:
    """One call of `gathered_attention` cut into chunks."""

    batch: int  # B
    length: int  # T
    heads: int  # H
    width: int  # Dh
    num_chosen: int  # K
    itemsize: int  # bytes of an element of q and entries
    blocks: GatherBlocks

    @property
    def queries(self) -> int:
        return self.batch * self.length

    @property
    def chunk(self) -> int:
        return min(self.blocks.chunk, round_up(self.num_chosen, SUBLANES))

    @property
    def num_chunks(self) -> int:
        return cdiv(self.num_chosen, self.chunk)

    @property
    def num_keys(self) -> int:
        """K in whole chunks."""
        return self.num_chunks * self.chunk

    def vmem_bytes(self) -> int:
        """VMEM of one grid step, in bytes. Operands and results are double buffered."""
        heads = round_up(self.heads, SUBLANES)
        tile = heads * self.width * self.itemsize  # q or o
        index = 4 * round_up(self.num_chunks, FLOAT32_SUBLANES) * round_up(self.chunk, LANES)
        lse = 4 * FLOAT32_SUBLANES * round_up(self.heads, LANES)
        fetched = self.num_keys * 4 * self.width  # a word holds a number or a pair
        kept = 4 * heads * (self.width + 2 * LANES)
        # Logits and weights in float32, weights rounded, their product; the chosen halves of words.
        in_flight = heads * (round_up(self.chunk, LANES) * (8 + self.itemsize) + 4 * self.width)
        in_flight += self.chunk * self.width * (4 + self.itemsize)
        return 2 * (2 * tile + index + lse) + fetched + kept + in_flight


CHUNK_COPIES = 128
"""Chosen rows a chunk: the lanes of the logits. With twice as many, starts cost 2 % less (schedule of v6e),
but rows have less time to arrive."""


def choose_gather_blocks(*, heads: int, width: int, num_chosen: int, itemsize: int) -> GatherBlocks:
    """CHUNK_COPIES for every size.

    Raises:
        ValueError: if the rows of a query do not fit in VMEM.
    """
    blocks = GatherBlocks(CHUNK_COPIES)
    g = GatherGeometry(1, 1, heads, width, num_chosen, itemsize, blocks)
    if g.vmem_bytes() > VMEM_LIMIT:
        raise ValueError(
            f"needs {g.vmem_bytes()} bytes of VMEM, there are {VMEM_LIMIT}: {heads=} {width=} {num_chosen=}"
        )
    return blocks


START = 7.7
"""Scalar cycles to start the copy of one row, the arithmetic between them included (schedule of v6e)."""

MASKED = 5.8e-3
"""Cycles a head, query and entry of the masked tiles: both products, mask and softmax (schedule of v6e at
Dh = 512: 68 % of the matrix units' peak; tpu7x 4.8e-3, 82 %)."""

MERGE = 6.4e-3
"""Cycles a byte of o to `merge` two parts: XLA's estimate of its fusion on v6e, half of what HBM allows."""

BYTES_A_CYCLE = 937.0
"""HBM bandwidth of v6e."""

LISTED = 1.0, 1 / 7700
"""Cycles a listed entry to make a query's list from its mask, and more for each entry of the mask. XLA's
estimate of `indexer.index_list` for v6e and tpu7x, within a third for S = 8192 .. 262144 and K = 512; with
K = 1024 this is up to three quarters too much."""


def gather_from(*, size: int, num_chosen: int, heads: int, width: int, itemsize: int) -> int:
    """The number of visible entries from which on CSA fetches instead of masking; for many queries, as in
    prefill. More than `size` where it never does.

        gathered:  K max(START, 4 Dh / BYTES_A_CYCLE) + H Dh itemsize MERGE + K (LISTED[0] + S LISTED[1])
        masked:    visible H MASKED

    in cycles a query, with S = `size` entries that there is room for and K = `num_chosen`. The window and
    the choice itself cost the same either way. An odd number of bfloat16 entries has no pairs: never.

    At Dh = 512 in bfloat16, in entries (four tokens each):

        room for S =                              4096     16384     65536     262144
        Flash (H = 64, K = 512), Pro (128, 1024)  never     16065     24870      60089

    The figures are a compiler's schedule and XLA's estimates, in which copies take no time to arrive; where
    they do, the switch lies higher. For the entries of 2048 tokens of Flash, in millions of cycles of v6e
    (tpu7x), without list and `merge`:

        visible     gathered       masked
        16384       8.1 (8.6)      12.4 (10.2)
        262144      8.1 (8.6)      198
    """
    if size * itemsize % 4:
        return size + 1
    fetch = max(START, 4 * width / BYTES_A_CYCLE)  # a row of words, be it one row or a pair
    listed = LISTED[0] + size * LISTED[1]
    gathered = num_chosen * (fetch + listed) + heads * width * itemsize * MERGE
    return math.ceil(gathered / (heads * MASKED))
