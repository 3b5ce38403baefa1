"""Core attention: the choice of entries and one softmax over window and entries, with or without a cache."""

from pallas_kernels.core_attention.index_loss import index_loss as index_loss
from pallas_kernels.core_attention.op import attend as attend
from pallas_kernels.core_attention.op import attend_cached as attend_cached
from pallas_kernels.core_attention.operands import Queries as Queries
from pallas_kernels.core_attention.xla import softmax_attention as softmax_attention
from pallas_kernels.core_attention.xla import view as view
