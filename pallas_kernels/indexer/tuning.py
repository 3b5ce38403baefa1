"""How the indexer picks its block sizes: legality, a VMEM formula, then a choice."""

import dataclasses

from pallas_kernels.arithmetic import round_up

LANES, SUBLANES, PACKED_SUBLANES, MASK_SUBLANES = 128, 8, 16, 32  # of 4, 4, 2 and 1-byte numbers


@dataclasses.dataclass(frozen=True, slots=True)
class IndexerBlocks:
    """Queries and keys of one grid step. Changes speed only, and the order of no sum but the gradients'.

    Queries of several sequences share a step only if each sequence brings all its queries (decode): then
    `sequences` > 1 and `queries` is T.
    """

    sequences: int
    queries: int  # of one sequence
    keys: int
    chunk: int = LANES  # keys scored, and counted, at a time within a step

    def __post_init__(self) -> None:
        problems = []
        if min(self.sequences, self.queries, self.keys, self.chunk) < 1:
            problems.append("every size must be positive")
        if self.rows % SUBLANES:
            problems.append(f"sequences x queries = {self.rows} must be a multiple of {SUBLANES}")
        if self.keys % LANES or self.chunk % LANES:
            problems.append(f"keys and chunk must be a multiple of {LANES}")
        elif self.keys % self.chunk:
            problems.append("keys must be a multiple of chunk")
        if problems:
            raise ValueError(f"{self}: " + "; ".join(problems))

    @property
    def rows(self) -> int:
        """Queries of one grid step, over all its sequences."""
        return self.sequences * self.queries

    @property
    def heads_first(self) -> bool:
        """Whether products are laid out [heads, queries]: then the sum over heads crosses no sublanes."""
        return self.queries % PACKED_SUBLANES == 0

    @property
    def group(self) -> int:
        """Sequences scored together: their rows fill whole registers, or are all there are."""
        fills = (n for n in range(1, self.sequences) if self.sequences % n == 0)
        return next((n for n in fills if n * self.queries % PACKED_SUBLANES == 0), self.sequences)

    @property
    def mask_bytes(self) -> int:
        """Bytes of one entry of the mask as the kernel writes it."""
        return 1 if self.rows % MASK_SUBLANES == 0 else 4

    def vmem_bytes(self, heads: int, width: int, size: int, itemsize: int) -> int:
        """Worst-case VMEM of one step of the selection, in bytes.

        Args:
            heads: Hi; width: Di; size: S; itemsize: bytes of a query number, and at most of a key number.
        """
        row = round_up(width, LANES) * itemsize
        query_tile = (
            self.rows * heads * (2 * row + (row if self.heads_first else 0))
        )  # two buffers; reordered
        weights = (
            self.rows * (2 * round_up(heads, LANES) + heads * LANES) * 4
        )  # two buffers; spread over lanes
        key_tile = 2 * self.sequences * self.keys * row  # two buffers
        products = self.queries * heads * self.chunk * 4  # of one sequence
        padded = round_up(size, self.keys)
        halves = 2 * 2 * round_up(self.rows, PACKED_SUBLANES) * padded  # of the ordered keys
        return query_tile + weights + key_tile + products + halves + self.mask_bytes * self.rows * padded


def choose_blocks(
    batch: int, length: int, heads: int, width: int, size: int, itemsize: int, *, vmem_budget: int
) -> IndexerBlocks:
    """Rows of many sequences for single tokens, else as many queries of one sequence as fit.

    Args:
        batch: B; length: T; heads: Hi; width: Di; size: S; itemsize: bytes of a query number.
        vmem_budget: bytes.

    Raises:
        ValueError: if not even the smallest block fits.
    """
    if length >= SUBLANES:
        shapes = [(1, 32), (1, 16), (1, 8)]
    else:
        shapes = [(n, length) for n in (32, 16, 8) if n == SUBLANES or n < batch + SUBLANES]
    longest = round_up(size, LANES)
    for sequences, queries in shapes:
        widest = (4096, 1024) if sequences == 1 else (2048, 512)
        for keys, chunk in (widest, (1024, 512), (512, 512), (256, 256), (128, 128)):
            if keys > max(longest, LANES):
                continue
            blocks = IndexerBlocks(sequences, queries, keys, chunk)
            if blocks.vmem_bytes(heads, width, size, itemsize) <= vmem_budget:
                return blocks
    raise ValueError(f"no legal block fits: {length=} {heads=} {width=} {size=} {vmem_budget=}")


def choose_gradient_blocks(
    batch: int, length: int, heads: int, width: int, size: int, itemsize: int, *, vmem_budget: int
) -> IndexerBlocks:
    """Blocks of the backward kernels, which hold the products of one sequence's step; as `choose_blocks`."""
    del batch, size
    shapes = [(1, n) for n in (32, 16, 8)] if length >= SUBLANES else [(SUBLANES, length)]
    for keys in (512, 256, 128):
        for sequences, queries in shapes:
            blocks = IndexerBlocks(sequences, queries, keys)
            row = round_up(width, LANES)
            tiles = blocks.rows * heads * row * (4 * itemsize + 4) + sequences * keys * row * (
                4 * itemsize + 4
            )
            products = 4 * queries * heads * keys * 4  # dots, weighted, e, and one more while they change
            if tiles + products + 2 * blocks.rows * keys * 4 <= vmem_budget:
                return blocks
    raise ValueError(f"no legal block fits: {length=} {heads=} {width=} {vmem_budget=}")
