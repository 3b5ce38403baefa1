"""Manifold-constrained hyper-connections (mHC): what happens to the residual streams around a sublayer."""

from pallas_kernels.hyper_connection.op import collapse as collapse
from pallas_kernels.hyper_connection.op import post as post
from pallas_kernels.hyper_connection.op import post_pre as post_pre
from pallas_kernels.hyper_connection.op import pre as pre
from pallas_kernels.hyper_connection.stream_maps import StreamMaps as StreamMaps
