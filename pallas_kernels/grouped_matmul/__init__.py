"""The routed experts of a mixture of experts as one operation."""

from pallas_kernels.grouped_matmul.op import expert_ffn as expert_ffn
from pallas_kernels.grouped_matmul.reference import expert_ffn_reference as expert_ffn_reference
