"""How the indexer picks its block sizes: legality, a VMEM formula, then a choice."""

import dataclasses

from pallas_kernels.arithmetic import round_up

LANES, SUBLANES = 128, 8


@dataclasses.dataclass(frozen=True, slots=True)
class IndexerBlocks:
    """Queries and keys of one grid step. Changes speed only, and the order of no sum but the gradients'.

    Queries of several sequences share a step only if each sequence brings all its queries (decode): then
    `sequences` > 1 and `queries` is T.
    """

    sequences: int
    queries: int  # of one sequence
    keys: int

    def __post_init__(self) -> None:
        problems = []
        if min(self.sequences, self.queries, self.keys) < 1:
            problems.append("every size must be positive")
        if self.rows % SUBLANES:
            problems.append(f"sequences x queries = {self.rows} must be a multiple of {SUBLANES}")
        if self.keys % LANES:
            problems.append(f"keys must be a multiple of {LANES}")
        if problems:
            raise ValueError(f"{self}: " + "; ".join(problems))

    @property
    def rows(self) -> int:
        """Queries of one grid step, over all its sequences."""
        return self.sequences * self.queries

    def vmem_bytes(self, heads: int, width: int, size: int, itemsize: int) -> int:
        """Worst-case VMEM of one step of the selection, in bytes.

        Args:
            heads: Hi; width: Di; size: S; itemsize: bytes of a query or key number.
        """
        query_tile = (
            2 * self.rows * heads * (round_up(width, LANES) * itemsize + 4)
        )  # q, weights; two buffers
        key_tile = 2 * self.sequences * self.keys * round_up(width, LANES) * itemsize
        products = 2 * self.queries * heads * self.keys * 4  # dots of one sequence, and weighted
        kept = 2 * self.rows * round_up(size, self.keys) * 4  # ordered keys, then the mask; two buffers
        return query_tile + key_tile + products + kept


def choose_blocks(
    length: int, heads: int, width: int, size: int, itemsize: int, *, vmem_budget: int
) -> IndexerBlocks:
    """Eight rows of eight sequences for single tokens, else as many queries of one sequence as fit.

    Args:
        length: T; heads: Hi; width: Di; size: S; itemsize: bytes of a query or key number.
        vmem_budget: bytes.

    Raises:
        ValueError: if not even the smallest block fits.
    """
    shapes = [(1, 32), (1, 16), (1, 8)] if length >= SUBLANES else [(SUBLANES, length)]
    for keys in (512, 256, 128):
        for sequences, queries in shapes:
            blocks = IndexerBlocks(sequences, queries, keys)
            if blocks.vmem_bytes(heads, width, size, itemsize) <= vmem_budget:
                return blocks
    raise ValueError(f"no legal block fits: {length=} {heads=} {width=} {size=} {vmem_budget=}")
