"""How many rows `expert_ffn` handles at a time: legality, a memory formula, then a choice."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """Rows (token-expert pairs of one expert) in one product. Changes speed only."""

    rows: int
    streamed: bool = False  # one row, weights read in place (`stream.py`), no copy of an expert

    def __post_init__(self) -> None:
        if self.rows < 1 or (self.streamed and self.rows != 1):
            raise ValueError(f"{self} needs rows >= 1, and rows = 1 when streamed")

    def workspace_bytes(self, hidden: int, width: int, *, backward: bool) -> int:
        """float32 temporaries of one expert (D = hidden, F = width), in bytes."""
        matrices = 0 if self.streamed else 3 * hidden * width  # W1, W3, W2
        activations = self.rows * (2 * hidden + 3 * width)  # rows in, out; gate, up, hidden
        if backward:  # dW1, dW3, dW2 and a gradient beside each activation
            return 4 * (2 * matrices + 2 * activations)
        return 4 * (matrices + activations)


def choose_blocks(
    num_pairs: int, num_experts: int, *, streamable: bool = False, backward: bool = False
) -> ExpertBlocks:
    """stub"""
    mean = num_pairs / num_experts
    if mean <= 3 and not backward:
        return ExpertBlocks(1, streamed=streamable)
    rows = 16 if backward else 8
    while rows < min(0.75 * mean, 128):
        rows *= 2
    return ExpertBlocks(rows)
