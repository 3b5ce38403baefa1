"""Tile sizes of the TPU kernels of `expert_ffn`: legality, a VMEM formula, then a choice. Not measured.

An item reads whole rows of its expert's matrices, so only their number in a tile is a choice: as many as the
budget holds, because every step costs the matrix unit a start. Rows of an item: enough for one item an expert
with even routing, since each item reads (and decodes) its expert anew.
"""

import dataclasses
from typing import Literal

from pallas_kernels.grouped_matmul.stored import Stack

LANES = 128
ROWS_AT_ONCE = 4
"""Rows that meet FP4 weights in one pass over them ("masked rows")."""
FEW_ROWS = 16
"""Of an item, up to which FP4 sums are scaled instead of FP4 weights."""
MOST_ROWS = 256
VMEM_BUDGET = 44 * 2**20
"""Bytes for the buffers named below."""
VMEM_LIMIT = 58 * 2**20
"""Bytes the compiler may use in all; the smallest VMEM of any chip in `chips.py` is 64 MiB."""

Kernel = Literal["output", "input", "weights"]


@dataclasses.dataclass(frozen=True, slots=True)
class ItemBlocks:
    """Rows of an item, and numbers of a weight's output and input axes in one tile.

    `inner` matters to the weights' gradient only: other kernels take whole rows of the weights.
    """

    rows: int
    outer: int
    inner: int = 0

    def __post_init__(self) -> None:
        if self.rows < 8 or self.rows % 8:
            raise ValueError(f"rows={self.rows} must be a positive multiple of 8")
        if self.outer < 1 or self.inner < 0:
            raise ValueError(f"{self} needs outer >= 1 and inner >= 0")

    def vmem_bytes(self, kernel: Kernel, stack: Stack, x_bytes: int) -> int:
        """VMEM of one grid step; x_bytes: of a number of x."""
        _, num, _, width = stack.shape
        rows, outer = self.rows, self.outer
        if kernel == "weights":
            rows_in = rows * (self.outer + self.inner) * x_bytes
            return 2 * (rows_in + outer * self.inner * stack.values.dtype.itemsize) + 8 * outer * self.inner
        tile = num * outer * stack.values.shape[-1] * stack.values.dtype.itemsize
        if stack.format == "mxfp4":
            tile += num * outer * max(LANES, stack.scale.shape[-1])
        activations = rows * width * x_bytes + 4 * num * rows * outer
        decoded = 0
        if stack.format != "plain" or stack.values.dtype.itemsize != x_bytes:
            decoded = outer * width * x_bytes
        if stack.format == "mxfp4":
            decoded += 2 * 2 * stack.scale.shape[-1] * (width // 2)  # the spreading matrix
            if kernel == "output" and rows <= FEW_ROWS:
                wide = 2 * 8 * rows * width  # bfloat16, every row eight times
                decoded = max(decoded, wide + 4 * rows * (width + num * outer))
        sums = 8 * rows * (width if kernel == "input" else num * outer)
        return 2 * (tile + activations) + decoded + sums


def choose_rows(num_pairs: int, num_experts: int) -> int:
    """A power of two in 8 .. MOST_ROWS that few experts exceed if routing is even."""
    rows = 8
    while rows < min(1.25 * num_pairs / num_experts + 4, MOST_ROWS):
        rows *= 2
    return rows


def choose_blocks(
    kernel: Kernel, rows: int, stack: Stack, x_bytes: int, *, vmem_budget: int = VMEM_BUDGET
) -> ItemBlocks:
    """The largest tile that fits the budget.

    Args:
        rows: of an item.
        stack: [S, M, N, K]; a tile's sizes divide N (and K), or are the whole of them.
        x_bytes: of a number of x.
    """
    _, num, outer, width = stack.shape
    inners = _divisors(width, 1024) if kernel == "weights" else [0]
    for block in _divisors(outer, 512 if num == 2 else 1024):
        for inner in inners:
            blocks = ItemBlocks(rows, block, inner)
            if blocks.vmem_bytes(kernel, stack, x_bytes) <= vmem_budget:
                return blocks
    return ItemBlocks(rows, _divisors(outer, LANES)[-1], min(inners))


def _divisors(size: int, most: int) -> list[int]:
    """Multiples of 128 up to `most` that divide `size`, the largest first; without any, `size` itself."""
    found = [n for n in range(min(size, most) // LANES * LANES, 0, -LANES) if size % n == 0]
    return found or [size]
