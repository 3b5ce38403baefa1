"""How `linear_cross_entropy` picks its tiles: legality, a VMEM formula, then a choice. Nothing is measured.

Of the two operands one stays in VMEM while the other streams past it. Each byte that streams serves 2 * b
FLOP (4 * b in the gradients), b being the rows of the block that stays, divided by the bytes of a number: the
larger that block, the less HBM bandwidth limits. The streaming block only has to be large enough to
feed the matrix unit.
"""

import dataclasses
from typing import Literal

from pallas_kernels.arithmetic import round_up

LANES = 128
COLUMNS_AT_ONCE = 1024
"""Channels of a gradient block that one product makes: bounds the product's temporary."""

STREAMING = {"forward": (640, 256, 128), "d_hidden": (256, 128), "d_head": (512, 256, 128)}
"""Rows of the operand that streams, best first. 640 and 256 divide V4's 129,280: no last block sticks out of
the vocabulary and has to be masked. The gradients sum over these rows: 640 would leave a sixth of a matrix
unit of 256 rows idle."""

VMEM_BUDGET = 40 * 2**20
"""Bytes for the buffers named below. The smallest VMEM of any chip in `chips.py` is 64 MiB."""
VMEM_LIMIT = 60 * 2**20
"""Bytes the compiler may use in all."""

Kernel = Literal["forward", "d_hidden", "d_head"]


@dataclasses.dataclass(frozen=True, slots=True)
class LinearCrossEntropyBlocks:
    """Tokens and vocabulary entries of one logits tile. Changes speed and the order of sums only."""

    tokens: int
    vocab: int

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab"):
            if (size := getattr(self, name)) <= 0 or size % LANES:
                raise ValueError(f"{name}={size} must be a positive multiple of {LANES}")

    def vmem_bytes(
        self, kernel: Kernel, hidden_size: int, hidden_bytes: int, head_bytes: int, precision: str
    ) -> int:
        """VMEM of one grid step.

        Args:
            kernel: which of the three kernels.
            hidden_size: D.
            hidden_bytes, head_bytes: bytes of one number of `hidden` and `head`.
            precision: as in `op.linear_cross_entropy`.
        """
        hidden = self.tokens * hidden_size * hidden_bytes
        head = self.vocab * hidden_size * head_bytes
        tile = 4 * self.tokens * self.vocab
        operands = 2 * hidden + 2 * head  # double buffered
        # The matrix unit takes bfloat16: a rounded copy of float32 numbers, or the three terms of their sum.
        terms = 1 if precision == "bfloat16" else 3
        for num_bytes, rows in ((hidden_bytes, self.tokens), (head_bytes, self.vocab)):
            if num_bytes == 4:
                operands += 2 * terms * rows * hidden_size
        tiles = 3 * tile  # logits, their exponentials or gradient, and an operand of the next product
        if kernel == "forward":
            # ids, nll, lse double buffered and three running values, each a row padded to 8 sublanes.
            return operands + tiles + 4 * 8 * self.tokens * (2 * 3 + 3)
        stays, rows = (hidden, self.tokens) if kernel == "d_hidden" else (head, self.vocab)
        accumulator = 4 * rows * hidden_size
        product = 4 * rows * min(hidden_size, COLUMNS_AT_ONCE)
        # ids, lse and two cotangents double buffered.
        return operands + tiles + 2 * stays + accumulator + product + 4 * 8 * self.tokens * 2 * 4


def choose_blocks(
    kernel: Kernel,
    num_tokens: int,
    num_vocab: int,
    hidden_size: int,
    hidden_bytes: int,
    head_bytes: int,
    precision: str,
    *,
    vmem_budget: int = VMEM_BUDGET,
) -> LinearCrossEntropyBlocks:
    """The largest block that stays, then the largest that streams, whose `vmem_bytes` fit the budget."""
    most_tokens, most_vocab = round_up(num_tokens, LANES), round_up(num_vocab, LANES)
    for stays in (1024, 512, 256, 128):
        for streams in STREAMING[kernel]:
            tokens, vocab = (streams, stays) if kernel == "d_head" else (stays, streams)
            blocks = LinearCrossEntropyBlocks(min(tokens, most_tokens), min(vocab, most_vocab))
            if blocks.vmem_bytes(kernel, hidden_size, hidden_bytes, head_bytes, precision) <= vmem_budget:
                return blocks
    raise ValueError(f"no legal block fits: {kernel=} {hidden_size=} {vmem_budget=}")
