"""Manifold-constrained hyper-connections: N residual streams, mixed by doubly stochastic matrices.

Report, section 2.2; mHC paper arXiv 2512.24880. Everything here is float32; streams are stored in the
compute dtype.
"""

from flax import nnx
from jaxtyping import Array, Float, Float32

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.operations import Operations, StreamMaps


class HyperConnection(nnx.Module):
    """The maps of one sublayer: fn f32[2N + N^2, N, D] rows (pre, post, comb row-major), base, scale.

    A sublayer is `enter`, its own work, `leave`; between two sublayers `advance` of the second does both, and
    kernels then read the streams once. The maps are for `leave` and `advance`, and to be looked at.
    """

    def __init__(self, config: ModelConfig, operations: Operations, declared: Declared) -> None:
        self.fn = declared("fn")
        self.base = declared("base")
        self.scale = declared("scale")
        self.num_iters = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.operations = operations

    def enter(
        self, streams: Float[Array, "B T N D"], norm: Float32[Array, "D"]
    ) -> tuple[Float[Array, "B T D"], StreamMaps]:
        """The sublayer's input: the streams combined, then its RMSNorm with this weight."""
        return self.operations.enter(streams, *self._weights(norm), **self._settings())

    def leave(
        self, streams: Float[Array, "B T N D"], update: Float[Array, "B T D"], maps: StreamMaps
    ) -> Float[Array, "B T N D"]:
        """The streams after the sublayer gave `update`."""
        return self.operations.leave(streams, update, maps)

    def advance(
        self,
        streams: Float[Array, "B T N D"],
        update: Float[Array, "B T D"],
        maps: StreamMaps,
        norm: Float32[Array, "D"],
    ) -> tuple[Float[Array, "B T N D"], Float[Array, "B T D"], StreamMaps]:
        """`leave` of the sublayer before, whose update and maps these are, then `enter` of this one."""
        return self.operations.advance(streams, update, maps, *self._weights(norm), **self._settings())

    def _weights(self, norm):
        return self.fn[...], self.base[...], self.scale[...], norm

    def _settings(self):
        return {"num_iters": self.num_iters, "hc_eps": self.eps, "norm_eps": self.norm_eps}


class StreamCollapse(nnx.Module):
    """The head's collapse of N streams into one: sigmoid gates only (report, section 2.2)."""

    def __init__(self, config: ModelConfig, operations: Operations, declared: Declared) -> None:
        self.fn = declared("fn")
        self.base = declared("base")
        self.scale = declared("scale")
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.operations = operations

    def __call__(self, streams: Float[Array, "B T N D"]) -> Float[Array, "B T D"]:
        """sum_j (sigmoid(z_j scale + base_j) + eps) X[j]."""
        weights = self.fn[...], self.base[...], self.scale[...]
        return self.operations.collapse(streams, *weights, hc_eps=self.eps, norm_eps=self.norm_eps)
