"""Attention over a sliding window and compressed entries in one softmax, with a sink logit per head."""

from pallas_kernels.hybrid_attention.gathered import gathered_attention as gathered_attention
from pallas_kernels.hybrid_attention.merge import csa_attention as csa_attention
from pallas_kernels.hybrid_attention.merge import merge as merge
from pallas_kernels.hybrid_attention.op import hybrid_attention as hybrid_attention
from pallas_kernels.hybrid_attention.reference import (
    gathered_attention_reference as gathered_attention_reference,
)
from pallas_kernels.hybrid_attention.reference import (
    hybrid_attention_reference as hybrid_attention_reference,
)
