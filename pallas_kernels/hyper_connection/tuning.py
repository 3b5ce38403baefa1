"""How the hyper-connection kernels pick their block size: legality, a VMEM formula, then a choice."""

import dataclasses

from pallas_kernels.arithmetic import round_up

LANES = 128
TOKEN_TILE = 16  # rows of a packed bfloat16 vector register; the kernels walk a block in such groups
PART_ROWS = 16  # rows of `fn` are padded to this, the tile of its bfloat16 parts
MAX_STREAMS = 6  # beyond it a token's maps, scores and norms no longer fit 128 lanes

VMEM_BUDGET = 44 * 2**20  # bytes; the smallest core (v5p, tpu7x) has 64 MiB
VMEM_SLACK = 8 * 2**20  # bytes on top for what the compiler spills


@dataclasses.dataclass(frozen=True, slots=True)
class HyperConnectionBlocks:
    """Tokens of one grid step, and channels of one trip of the inner loops. Changes speed only."""

    tokens: int
    channels: int

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.tokens % TOKEN_TILE:
            raise ValueError(f"tokens={self.tokens} must be a positive multiple of {TOKEN_TILE}")
        if self.channels <= 0 or self.channels % LANES:
            raise ValueError(f"channels={self.channels} must be a positive multiple of {LANES}")

    def vmem_bytes(self, *, streams: int, hidden: int, rows: int, itemsize: int, backward: bool) -> int:
        """Worst-case VMEM of one grid step of the fused kernel, in bytes (N = streams, D = hidden)."""
        tile = self.tokens * hidden * itemsize  # one stream, or the sublayer's input or output
        columns = 4 * self.tokens * LANES  # one float32 register column a token
        padded_rows = round_up(rows, PART_ROWS)
        fn = 4 * padded_rows * streams * hidden
        parts = 3 * 2 * padded_rows * streams * hidden if itemsize == 2 else fn
        if not backward:
            # streams in and out, y, x; maps in and out, saved; fn, norm weight: double buffered.
            buffers = 2 * ((2 * streams + 2) * tile + 3 * columns + fn + 4 * 8 * hidden)
            return buffers + parts + 3 * columns  # squares, rows of maps, their transpose
        # streams, d_streams_out, d_streams; y, d_x, d_y; maps, saved, d_maps x 2, d_affine; fn, d_fn; norm
        # weight, d_norm_weight: double buffered.
        buffers = 2 * ((3 * streams + 3) * tile + 5 * columns + 2 * fn + 4 * (8 + TOKEN_TILE) * hidden)
        # next streams, parts, d_scores fn, one sum a map, Sinkhorn's iterates (at most 32 steps kept), the
        # two parts of d_scores, and rows / columns of small numbers.
        scratch = streams * tile + parts + 4 * streams * self.tokens * self.channels
        return buffers + scratch + (rows + 64 * 24 // TOKEN_TILE + 8) * columns


def choose_blocks(
    num_tokens: int, *, streams: int, hidden: int, rows: int, itemsize: int, backward: bool
) -> HyperConnectionBlocks:
    """The largest block that fits VMEM, at most the tokens there are, at most 128 (a register's lanes)."""
    channels = next(c for c in (512, 256, 128) if hidden % c == 0)
    for tokens in (128, 64, 32, 16):
        blocks = HyperConnectionBlocks(tokens, channels)
        needed = blocks.vmem_bytes(
            streams=streams, hidden=hidden, rows=rows, itemsize=itemsize, backward=backward
        )
        if needed <= VMEM_BUDGET and tokens < 2 * round_up(num_tokens, TOKEN_TILE):
            return blocks
    raise ValueError(f"no block fits {VMEM_BUDGET} bytes of VMEM: {streams=} {hidden=} {itemsize=}")
