"""Products with weights that stay FP8 in memory."""

from pallas_kernels.block_matmul.op import block_matmul as block_matmul
from pallas_kernels.block_matmul.products import grouped_linear as grouped_linear
from pallas_kernels.block_matmul.products import linear as linear
from pallas_kernels.block_matmul.reference import block_matmul_reference as block_matmul_reference
from pallas_kernels.block_matmul.xla import grouped_matmul_xla as grouped_matmul_xla
from pallas_kernels.block_matmul.xla import matmul_xla as matmul_xla
