"""Attention over a sliding window and compressed entries in one softmax, with a sink logit per head."""

from pallas_kernels.hybrid_attention.op import hybrid_attention as hybrid_attention
from pallas_kernels.hybrid_attention.reference import (
    hybrid_attention_reference as hybrid_attention_reference,
)
