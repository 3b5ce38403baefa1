"""Manifold-constrained hyper-connections: N residual streams, mixed by doubly stochastic matrices.

Report, section 2.2; mHC paper arXiv 2512.24880. Everything here is float32; streams are stored in the
compute dtype. Per-token matrices are kept with tokens on the minor axis: a 4 x 4 matrix a token would
leave every vector unit nearly empty.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.linear import flat, project_float32
from dsv4_jax.model.norm import rms_norm
from dsv4_jax.numerics.policy import Policy
from pallas_kernels import hyper_connection as kernels
from pallas_kernels.precision import einsum_float32


class StreamMaps(NamedTuple):
    """One sublayer's per-token weights; tokens are the last two axes."""

    pre: Float32[Array, "N B T"]  # stream j -> sublayer input
    post: Float32[Array, "N B T"]  # sublayer output -> stream k
    comb: Float32[Array, "N N B T"]  # comb[j, k]: from input stream j to output stream k


def sinkhorn(logits: Float32[Array, "N N B T"], num_iters: int, eps: float) -> Float32[Array, "N N B T"]:
    """Projects each logits[:, :, b, t] towards the doubly stochastic matrices (report, section 2.2).

    Row softmax, then columns, then `num_iters` - 1 times rows and columns; `eps` is added to the softmax
    and to every denominator. The last step normalises columns (axis 0, over input streams j).
    """
    mix = jax.nn.softmax(logits, axis=1) + eps
    mix = mix / (mix.sum(axis=0, keepdims=True) + eps)

    def normalise(mix: jax.Array, _: None) -> tuple[jax.Array, None]:
        mix = mix / (mix.sum(axis=1, keepdims=True) + eps)
        return mix / (mix.sum(axis=0, keepdims=True) + eps), None

    return jax.lax.scan(normalise, mix, None, length=num_iters - 1)[0]


def _scores(
    streams: Float[Array, "B T N D"], fn: Float32[Array, "rows N D"], eps: float
) -> Float32[Array, "rows B T"]:
    """(v fn^T) / rms(v) with v the flattened streams; dividing after the product is the same algebra."""
    x = flat(streams.astype(jnp.float32))
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + eps)
    return jnp.moveaxis(project_float32(x, flat(fn)), -1, 0) * inverse_rms


def _mix(streams, comb):
    """f32[B, T, N, D]: sum_j comb[j, k] X[j] for every k."""
    by_token = jnp.moveaxis(comb, (0, 1), (-2, -1))[..., None]  # [B, T, N, N, 1]
    # Spelled out per stream: a batched 4 x 4 product a token is far slower than N multiply-adds.
    return sum(
        by_token[:, :, j] * streams[:, :, j, None].astype(jnp.float32) for j in range(streams.shape[2])
    )


# The gradients of `combine` and `expand` are stated by hand: autodiff turns every stream's slice into a
# padded copy of all streams, three times the work and twice the compile time of a sublayer.


@jax.custom_vjp
def combine(streams: Float[Array, "B T N D"], pre: Float32[Array, "N B T"]) -> Float[Array, "B T D"]:
    """sum_j pre[j] X[j]: float32 sum, one cast to the dtype of the streams."""
    total = sum(pre[j][..., None] * streams[:, :, j].astype(jnp.float32) for j in range(streams.shape[2]))
    return total.astype(streams.dtype)


def _combine_backward(saved, d_out):
    streams, pre = saved
    d_out = d_out.astype(jnp.float32)
    d_streams = jnp.moveaxis(pre, 0, -1)[..., None] * d_out[:, :, None]
    d_pre = einsum_float32("btnd,btd->nbt", streams.astype(jnp.float32), d_out)
    return d_streams.astype(streams.dtype), d_pre


combine.defvjp(lambda streams, pre: (combine(streams, pre), (streams, pre)), _combine_backward)


def expand(
    streams: Float[Array, "B T N D"], update: Float[Array, "B T D"], maps: StreamMaps
) -> Float[Array, "B T N D"]:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j] (report, section 2.2); float32 sum, one cast."""
    return _expand(streams, update, maps.post, maps.comb)


@jax.custom_vjp
def _expand(streams, update, post, comb):
    written = jnp.moveaxis(post, 0, -1)[..., None] * update[:, :, None].astype(jnp.float32)
    return (written + _mix(streams, comb)).astype(streams.dtype)


def _expand_backward(saved, d_out):
    streams, update, post, comb = saved
    d_out32 = d_out.astype(jnp.float32)
    d_streams = _mix(d_out, comb.swapaxes(0, 1)).astype(streams.dtype)
    d_update = combine(d_out, post).astype(update.dtype)
    d_post = einsum_float32("btd,btkd->kbt", update.astype(jnp.float32), d_out32)
    d_comb = einsum_float32("btjd,btkd->jkbt", streams.astype(jnp.float32), d_out32)
    return d_streams, d_update, d_post, d_comb


_expand.defvjp(lambda *operands: (_expand(*operands), operands), _expand_backward)


KernelMaps = Float32[Array, "B T rows"]
"""A sublayer's weights as the kernels keep them: pre, post, comb row-major."""


class HyperConnection(nnx.Module):
    """The maps of one sublayer: fn f32[2N + N^2, N, D] rows (pre, post, comb row-major), base, scale.

    A sublayer is `enter`, its own work, `leave`; between two sublayers `advance` of the second does both, and
    the kernels then read the streams once. The maps are for `leave`, `advance` and `mixing` only.
    """

    def __init__(self, config: ModelConfig, policy: Policy, declared: Declared) -> None:
        self.fn = declared("fn")
        self.base = declared("base")
        self.scale = declared("scale")
        self.num_streams = config.hc_mult
        self.num_iters = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.policy = policy

    def maps(self, streams: Float[Array, "B T N D"]) -> StreamMaps:
        """The maps computed from the streams that enter the sublayer (report, section 2.2)."""
        n = self.num_streams
        z = _scores(streams, self.fn[...], self.norm_eps)
        base, scale = self.base[...][:, None, None], self.scale[...]
        pre = jax.nn.sigmoid(z[:n] * scale[0] + base[:n]) + self.eps
        post = 2 * jax.nn.sigmoid(z[n : 2 * n] * scale[1] + base[n : 2 * n])
        logits = (z[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n, *z.shape[1:])
        return StreamMaps(pre, post, sinkhorn(logits, self.num_iters, self.eps))

    def enter(
        self, streams: Float[Array, "B T N D"], norm: Float32[Array, "D"]
    ) -> tuple[Float[Array, "B T D"], StreamMaps | KernelMaps]:
        """The sublayer's input: the streams combined, then its RMSNorm with this weight."""
        if self.policy.kernels == "xla":
            maps = self.maps(streams)
            return rms_norm(combine(streams, maps.pre), norm, self.norm_eps), maps
        return kernels.pre(streams, *self._weights(norm), **self._settings())

    def leave(
        self, streams: Float[Array, "B T N D"], update: Float[Array, "B T D"], maps: StreamMaps | KernelMaps
    ) -> Float[Array, "B T N D"]:
        """The streams after the sublayer gave `update`."""
        if self.policy.kernels == "xla":
            return expand(streams, update, maps)
        return kernels.post(streams, update, maps, interpret=self.policy.interpret)

    def advance(
        self,
        streams: Float[Array, "B T N D"],
        update: Float[Array, "B T D"],
        maps: StreamMaps | KernelMaps,
        norm: Float32[Array, "D"],
    ) -> tuple[Float[Array, "B T N D"], Float[Array, "B T D"], StreamMaps | KernelMaps]:
        """`leave` of the sublayer before, whose update and maps these are, then `enter` of this one."""
        if self.policy.kernels == "xla":
            streams = expand(streams, update, maps)
            return streams, *self.enter(streams, norm)
        return kernels.post_pre(streams, update, maps, *self._weights(norm), **self._settings())

    def mixing(self, maps: StreamMaps | KernelMaps) -> Float32[Array, "N N B T"]:
        """comb of these maps, input stream first."""
        if isinstance(maps, StreamMaps):
            return maps.comb
        n = self.num_streams
        return jnp.moveaxis(maps[..., 2 * n :], -1, 0).reshape(n, n, *maps.shape[:2])

    def _weights(self, norm):
        return self.fn[...], self.base[...], self.scale[...], norm

    def _settings(self):
        return {
            "num_iters": self.num_iters,
            "hc_eps": self.eps,
            "norm_eps": self.norm_eps,
            "interpret": self.policy.interpret,
        }


class StreamCollapse(nnx.Module):
    """The head's collapse of N streams into one: sigmoid gates only (report, section 2.2)."""

    def __init__(self, config: ModelConfig, policy: Policy, declared: Declared) -> None:
        self.fn = declared("fn")
        self.base = declared("base")
        self.scale = declared("scale")
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.policy = policy

    def __call__(self, streams: Float[Array, "B T N D"]) -> Float[Array, "B T D"]:
        """sum_j (sigmoid(z_j scale + base_j) + eps) X[j]."""
        fn, base, scale = self.fn[...], self.base[...], self.scale[...]
        if self.policy.kernels != "xla":
            eps = {"hc_eps": self.eps, "norm_eps": self.norm_eps}
            return kernels.collapse(streams, fn, base, scale, **eps, interpret=self.policy.interpret)
        gates = jax.nn.sigmoid(_scores(streams, fn, self.norm_eps) * scale + base[:, None, None]) + self.eps
        return combine(streams, gates)
