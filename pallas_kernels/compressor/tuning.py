"""How many entries `compressor` makes a grid step: legality, a VMEM formula, a choice. Nothing is measured.

There is no matrix product: by the compiler's schedule the overlapping form (m = 4) is limited by the vector
unit, the plain form (m = 128) by HBM. A step only has to be large enough to hide its own overhead; larger
ones also take longer to compile.
"""

import dataclasses

from pallas_kernels.arithmetic import round_up

LANES = 128
SUBLANES = 8
HALO_ROWS = 16
"""Rows read before a step's own for the pair of blocks before it: a whole tile of either dtype."""

STEP_BYTES = 2 * 2**20
"""Of kv and gate rows a step: 0.6 (tpu7x) to 2.6 (v5e) microseconds of HBM traffic, published bandwidths."""
VMEM_BUDGET = 32 * 2**20
"""Bytes for the buffers named below. The smallest VMEM of any chip in `chips.py` is 64 MiB."""
VMEM_LIMIT = 60 * 2**20
"""Bytes the compiler may use in all."""


@dataclasses.dataclass(frozen=True, slots=True)
class CompressorBlocks:
    """Entries made by one grid step. Changes speed and the order of sums over blocks only."""

    entries: int

    def __post_init__(self) -> None:
        if self.entries <= 0 or self.entries % SUBLANES:
            raise ValueError(f"entries={self.entries} must be a positive multiple of {SUBLANES}")

    def vmem_bytes(self, ratio: int, branches: int, width: int, num_bytes: int, *, backward: bool) -> int:
        """VMEM of one grid step.

        Args:
            ratio: m.
            branches: w.
            width: Dc.
            num_bytes: bytes of one number of the rows.
        """
        channels = branches * width
        rows = self.entries * ratio * channels
        # Rows that are pooled together stand on whole groups of 8 sublanes.
        grouped = 4 * self.entries * round_up(branches * ratio, SUBLANES) * width
        halo = 2 * HALO_ROWS * width if branches == 2 else 0
        entry = self.entries * width
        tables = 4 * self.entries * (2 * LANES + LANES)  # cos, sin, and is_first padded to the lanes
        parameters = 4 * (round_up(ratio, SUBLANES) * channels + SUBLANES * width)
        if backward:
            # kv, gate, the halo, d_entry, d_kv, d_gate, tables, ape, norm, d_ape, d_norm double buffered.
            buffers = 2 * (num_bytes * (4 * rows + halo + entry) + tables + 2 * parameters)
            carry = 2 * 4 * HALO_ROWS * width if branches == 2 else 0
            return buffers + carry + 5 * grouped + 4 * 4 * entry  # values, logits, weights, two gradients
        # kv, gate, the halo, the entries, tables, ape and norm double buffered.
        buffers = 2 * (num_bytes * (2 * rows + halo + entry) + tables + parameters)
        return buffers + 3 * grouped + 4 * 2 * entry  # values, logits, weights; pooled and normalised


def choose_blocks(
    num_entries: int,
    ratio: int,
    branches: int,
    width: int,
    num_bytes: int,
    *,
    backward: bool,
    vmem_budget: int = VMEM_BUDGET,
) -> CompressorBlocks:
    """The most entries of at most `STEP_BYTES` of rows whose `vmem_bytes` fit the budget; at least 8."""
    row_bytes = 2 * branches * width * num_bytes  # kv and gate
    for entries in (512, 256, 128, 64, 32, 16, 8):
        blocks = CompressorBlocks(min(entries, round_up(num_entries, HALO_ROWS)))
        fits = blocks.vmem_bytes(ratio, branches, width, num_bytes, backward=backward) <= vmem_budget
        if fits and (entries * ratio * row_bytes <= STEP_BYTES or entries == SUBLANES):
            return blocks
    raise ValueError(f"no legal block fits: {ratio=} {branches=} {width=} {vmem_budget=}")
