"""Tile sizes of `block_matmul`: legality, a VMEM formula, then a choice. Not measured.

With few rows the weight is read once and its bytes decide; a summed block as long as the weight allows keeps
the rows in VMEM while the weight streams past. With many rows the weight is decoded anew for every block of
rows, on the vector unit, so blocks of rows are as large as VMEM allows.
"""

import dataclasses

from pallas_kernels.arithmetic import round_up

LANES = 128
VMEM_BUDGET = 32 * 2**20
"""Bytes for the buffers named below."""
VMEM_LIMIT = 56 * 2**20
"""Bytes the compiler may use in all; the smallest VMEM of any chip in `chips.py` is 64 MiB."""
FEW_ROWS = 128
"""Rows of x up to which scaling the sums is less work than scaling the weight."""
DECODED_ROWS = 128
"""Weight rows decoded at a time: the rows of one scale."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatmulBlocks:
    """Rows of x, and numbers of the weight's other and summed axes, in one product."""

    rows: int
    outer: int
    summed: int

    def __post_init__(self) -> None:
        if self.rows < 8 or self.rows % 8:
            raise ValueError(f"rows={self.rows} must be a positive multiple of 8")
        for name in ("outer", "summed"):
            if (size := getattr(self, name)) <= 0 or size % LANES:
                raise ValueError(f"{name}={size} must be a positive multiple of {LANES}")

    def vmem_bytes(self, x_bytes: int) -> int:
        """VMEM of one grid step; x_bytes: of a number of x."""
        tile = self.outer * self.summed
        double_buffered = self.rows * self.summed * x_bytes + tile + tile // LANES * 4
        double_buffered += self.rows * self.outer * x_bytes
        decoded = tile * x_bytes + 4 * DECODED_ROWS * max(self.outer, self.summed)
        return 2 * double_buffered + decoded + 4 * self.rows * self.outer


def choose_blocks(
    num_rows: int, outer: int, summed: int, x_bytes: int, *, vmem_budget: int = VMEM_BUDGET
) -> MatmulBlocks:
    """Most rows first, then the longest summed block, then the widest outer one, that fit the budget.

    Args:
        num_rows: T, a multiple of 8.
        outer, summed: the weight's sizes, multiples of 128; blocks divide them.
        x_bytes: of a number of x.
    """
    for rows in (1024, 512, 256, 128, 64, 32, 16, 8):
        if rows > max(8, round_up(num_rows, 8)) and rows > 8:
            continue
        for summed_block in _divisors(summed, 16384):
            for outer_block in _divisors(outer, 512):
                blocks = MatmulBlocks(rows, outer_block, summed_block)
                # Long sums first; but a tile of less than 256 outer columns leaves the matrix unit half idle.
                if outer_block < min(outer, 256):
                    break
                if blocks.vmem_bytes(x_bytes) <= vmem_budget:
                    return blocks
    return MatmulBlocks(8, LANES, LANES)


def _divisors(size: int, most: int) -> list[int]:
    """Multiples of 128 that divide `size`, the largest first."""
    return [n for n in range(min(size, most) // LANES * LANES, 0, -LANES) if size % n == 0]
