"""How many rows `expert_ffn` handles at a time: legality, a memory formula, then a choice by shape.

A block's rows are a trade between filling the matmul (and reading an expert's weights once for more rows)
and work on rows that are not the expert's. Below two rows an expert the copy of the weights out of their
stack is what costs, and single rows are streamed instead (`stream.py`).

Measured by `experiments/bench_grouped_matmul.py`: E = 32, Ke = 6, D = 512, F = 256, float32, two busy AVX2
cores, jax 0.10.2. Paired median time relative to the choice (1.00); bfloat16 agrees within 0.1. `torch` is
the eager loop of transformers.

    tokens, pairs an expert   streamed  rows 1     4     8    16    32    64   128   256   torch
       1     0.19                 1.00    1.30                                              3.4
       4     0.75                 1.00    1.48  1.73  2.45                                  5.8
       8     1.5                  1.00    1.24  1.34  1.48  2.53                            2.3
      16     3                    1.00    0.97  1.00  0.94  1.36  1.95                      1.6
      32     6                    1.51    1.12  1.19  1.00  1.12  1.63  2.78                2.5
      64    12                                  1.26  1.10  1.00  1.37  2.23  4.26          2.3
     128    24                                  1.50  1.10  1.06  1.00  1.45  2.50          1.6
     256    48                                        1.28  1.08  1.06  1.00  1.90  3.15    1.5
     512    96                                              1.32  1.01  1.00  1.23  1.90    1.3
    4096   768                                                          1.00  1.09  1.11    1.0
    forward and backward
      64    12                                              1.00  1.17
     128    24                                              1.08  1.00  1.36
     256    48                                              1.22  1.15  1.00  1.41
     512    96                                              1.39  1.23  1.13  1.00  1.62
    4096   768                                                                1.00  0.95

Slower everywhere, by the same script: a gathered copy of the weights for every pair (7x at 1 token, 23x at
8), every expert on every token (26x, 8x), `lax.ragged_dot` (13x to 70x). Without bfloat16 units, bfloat16
products instead of float32 ones cost 1.1x to 1.6x for more than a few rows. Tried and dropped: weights on
the right-hand side of the product (1.3x to 1.9x below 64 rows), one loop over blocks that slices the expert
anew for each (1.1x to 1.4x from 64 tokens), a gather of all rows before the loop and an inverse permutation
after it instead of a scatter-add in the loop (equal in time, P * D more memory), a shorter last block
(within 5 %), `argsort` or cumulative one-hot sums instead of one sort of integer keys.
"""

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


MAX_PAIRS_STREAMED = 2.0  # pairs an expert up to which single rows win
MAX_PAIRS_STREAMED_FP4 = 6.0  # with FP4, a decoded copy of which costs five times that of a bfloat16 matrix


def choose_blocks(
    num_pairs: int,
    num_experts: int,
    *,
    streamable: bool = False,
    most_streamed: float = MAX_PAIRS_STREAMED,
    backward: bool = False,
) -> ExpertBlocks:
    """Single rows for few pairs an expert, else the power of two at or above 3/4 of that mean, bounded.

    Args:
        num_pairs: P, that are expected; T * Ke if nothing is known of padding and foreign experts.
        num_experts: E.
        streamable: whether widths and dtypes suit `stream.py`.
        most_streamed: pairs an expert up to which streaming wins; depends on the format.
        backward: for the gradients; their products gain from more rows, and never stream.
    """
    mean = num_pairs / num_experts
    if streamable and mean <= most_streamed and not backward:
        return ExpertBlocks(1, streamed=True)
    if mean <= MAX_PAIRS_STREAMED and not backward:
        return ExpertBlocks(1)
    rows, most = (16, 128) if backward else (4, 64)
    while rows < min(0.75 * mean, most):
        rows *= 2
    return ExpertBlocks(rows)
