"""Exact top-k as a membership mask."""

from pallas_kernels.topk_mask.op import topk_mask as topk_mask
from pallas_kernels.topk_mask.reference import topk_mask_reference as topk_mask_reference
