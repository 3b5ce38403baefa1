"""How the hyper-connection kernels pick their block size: legality, a VMEM formula, then a choice."""

import dataclasses

from pallas_kernels.arithmetic import round_up

LANES = 128
SUBLANES = 8  # rows of a float32 vector register
TOKEN_TILE = 16  # rows of a packed bfloat16 vector register
PARTS = 3  # bfloat16 parts of a float32 number: 3 x 8 significant bits
MAX_STREAMS = 6  # beyond it a token's maps, scores and norms no longer fit 128 lanes

VMEM_BUDGET = 50 * 2**20  # bytes; the smallest core (v5p, tpu7x) has 64 MiB
VMEM_SLACK = 8 * 2**20  # bytes on top for what the compiler spills


def part_rows(num_rows: int, itemsize: int) -> int:
    """Rows of the scratch with `fn`: its bfloat16 parts below one another, or itself."""
    height = round_up(num_rows, SUBLANES)
    return round_up(PARTS * height, TOKEN_TILE) if itemsize == 2 else height


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
        chunk = self.tokens * self.channels
        columns = 4 * self.tokens * LANES  # one float32 register column a token
        lines = 4 * LANES * max(self.tokens, LANES)
        fn = 4 * round_up(rows, SUBLANES) * streams * hidden
        parts = part_rows(rows, itemsize) * streams * hidden * itemsize
        weights = 4 * SUBLANES * hidden  # one number a channel, padded to a register's rows
        maps = streams + streams * streams  # post and comb
        if not backward:
            # streams in and out, y, x; maps in and out, saved; fn, norm weight: double buffered.
            buffers = 2 * ((2 * streams + 2) * tile + 3 * columns + fn + weights)
            # maps and pre spread over the lanes, sums, lines; scores with squares; a chunk.
            scores = 4 * self.tokens * round_up(part_rows(rows, itemsize) + self.tokens, LANES)
            scratch = (maps + streams + 1) * columns + lines + scores + streams * chunk * itemsize
            return buffers + parts + scratch
        # streams, d_streams_out, d_streams; y, d_x, d_y; maps, saved, d_maps x 2, d_affine; fn, d_fn; norm
        # weight, d_norm_weight: double buffered.
        buffers = 2 * ((3 * streams + 3) * tile + 5 * columns + 2 * fn + 2 * weights)
        # next streams, parts, d_scores fn; maps spread and summed, pre and three factors, sums over channels.
        scratch = streams * tile + parts + 4 * streams * chunk
        scratch += (2 * maps + (streams + 3) + (2 * streams + 2) + 1) * columns
        # lines, d_scores, Sinkhorn's iterates (at most 2 * 32 steps kept).
        return buffers + scratch + (2 + 64 * round_up(maps, SUBLANES) // LANES) * lines


def choose_blocks(
    num_tokens: int, *, streams: int, hidden: int, rows: int, itemsize: int, backward: bool
) -> HyperConnectionBlocks:
    """The largest block that fits VMEM, at most the tokens there are, at most 128 (a register's lanes).

    A trip of an inner loop is straight-line code for all tokens: enough of it to hide the matrix unit's
    latency, and no more.
    """
    for tokens in (128, 64, 32, 16):
        most = (32768 if backward else 65536) // tokens
        channels = next(c for c in (1024, 512, 256, 128) if hidden % c == 0 and c <= max(most, LANES))
        blocks = HyperConnectionBlocks(tokens, channels)
        needed = blocks.vmem_bytes(
            streams=streams, hidden=hidden, rows=rows, itemsize=itemsize, backward=backward
        )
        if needed <= VMEM_BUDGET and tokens < 2 * round_up(num_tokens, TOKEN_TILE):
            return blocks
    raise ValueError(f"no block fits {VMEM_BUDGET} bytes of VMEM: {streams=} {hidden=} {itemsize=}")
