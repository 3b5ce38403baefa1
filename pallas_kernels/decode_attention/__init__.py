"""Attention of a few new tokens a sequence, straight over the cache."""

from pallas_kernels.decode_attention.op import decode_attention as decode_attention
from pallas_kernels.decode_attention.reference import (
    decode_attention_reference as decode_attention_reference,
)
