"""How many numbers share one scale (report, sections 3.4, 3.5 and 5.2.1). This is the only copy."""

FP8_BLOCK = 128
"""Rows and columns of the blocks of an FP8 weight matrix; the last blocks of a matrix may be partial."""

ACTIVATION_GROUP = 128
"""Consecutive channels of an FP8 activation."""

ENTRY_GROUP = 64
"""Consecutive channels, not rotated ones, of an FP8 window row or compressed entry."""

FP4_GROUP = 32
"""Consecutive numbers of a row in FP4 (MXFP4): inputs of a weight matrix, channels of an index key."""
