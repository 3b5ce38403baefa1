"""Compressed attention entries: gated pooling of blocks of tokens, normalised and rotated, in one pass."""

from pallas_kernels.compressor.op import compressor as compressor
from pallas_kernels.compressor.reference import compressor_reference as compressor_reference
