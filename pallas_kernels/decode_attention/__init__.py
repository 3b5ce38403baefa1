"""Attention of a few new tokens a sequence, straight over the cache."""

from pallas_kernels.decode_attention.fp8_entries import Fp8Entries as Fp8Entries
from pallas_kernels.decode_attention.fp8_rows import Fp8Rows as Fp8Rows
from pallas_kernels.decode_attention.op import decode_attention as decode_attention
from pallas_kernels.decode_attention.reference import (
    decode_attention_reference as decode_attention_reference,
)
