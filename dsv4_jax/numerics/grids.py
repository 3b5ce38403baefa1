"""What a model rounds where: a `Policy` resolved to functions, once (report, sections 3.4 and 5.2.1).

Modules write `kv = grids.entry(kv)` and do not know what makes it round: a part of the quantisation
simulation (`qat.SWITCHES`), or the format of the cache, which rounds with a cache or without, so that prefill
sees the values that decode will read.

    grid         rounds when                          to
    activation   act_fp8                              FP8 by 128 channels
    expert       expert_fp4                           FP4 by 32 inputs
                 else weights="fp8"                   FP8 by 128 x 128
    weight       weights="fp8"                        FP8 by 128 x 128
    entry        the cache is quantised               what the cache will hold
                 else kv_fp8                          FP8 by 64 channels, not the rotary ones
    index_query  idx_hadamard_fp4 or "fp8+mxfp4"      Hadamard transform, FP4 by 32 channels
                 "fp8+fp8"                            Hadamard transform only
    index_key    idx_hadamard_fp4 or "fp8+mxfp4"      Hadamard transform, FP4 by 32 channels
                 "fp8+fp8"                            Hadamard transform, FP8 with one scale
    score        idx_score_bf16                       bfloat16

Every function keeps the dtype of its argument and is the identity where nothing rounds. Roundings have
gradient 1, the Hadamard transform its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.numerics import cache_formats, qat
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.weights import Weight, plain

Rounding = Callable[[jax.Array], jax.Array]


def as_it_is(x: Any) -> Any:
    """x."""
    return x


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A function with all arguments but the first; equal ones are one key of a compiled program."""

    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...]

    def __call__(self, x: Any) -> jax.Array:
        return self.function(x, *self.arguments)


@dataclasses.dataclass(frozen=True)
class Grids:
    """The roundings of one model, each over the last axis of an array [..., C]; without arguments, none.

    Attributes:
        activation: of an input of an FP8 or FP4 matmul.
        entry: of a rotated window row or compressed entry.
        index_query, index_key: of a rotated indexer query or key.
        score: of every step of the index scores.
        expert: of a routed expert's weights, which become plain ones in the parameters' dtype.
        weight: of the other matrices [*stack, O, I] that official releases store with scales, if they are
            plain: in training.
        compressor_dtype: float32 if the compressors' matmuls compute in it (compressor_fp32); None: in the
            compute dtype.
    """

    activation: Rounding = as_it_is
    entry: Rounding = as_it_is
    index_query: Rounding = as_it_is
    index_key: Rounding = as_it_is
    score: Rounding = as_it_is
    expert: Callable[[Weight], Weight] = as_it_is
    weight: Rounding = as_it_is
    compressor_dtype: np.dtype | None = None

    @property
    def hidden(self) -> Rounding | None:
        """`activation` for an expert's hidden values; None where nothing rounds.

        The routing weight multiplies them before they are rounded, and without rounding after W2.
        """
        return None if self.activation is as_it_is else self.activation

    @property
    def rounds_scores(self) -> bool:
        """Whether `score` does anything: no kernel can."""
        return self.score is not as_it_is


@functools.lru_cache(maxsize=64)
def grids(policy: Policy, num_rotary: int) -> Grids:
    """The roundings that a policy asks for.

    Args:
        policy: of the model.
        num_rotary: Dr, the last channels of an entry, which FP8 entries keep in bfloat16.
    """
    cache, simulates = policy.cache_format, policy.simulates
    entry: Rounding = as_it_is
    if cache != "plain":
        entry = _Bound(cache_formats.round_entries, (cache, num_rotary))
    elif simulates("kv_fp8"):
        entry = _Bound(qat.fake_entry, (num_rotary,))
    index_query = index_key = as_it_is
    if cache == "fp8+fp8":
        # Products of bfloat16 and FP8 are exact, so queries need no rounding.
        index_query, index_key = qat.hadamard, _fp8_key
    elif simulates("idx_hadamard_fp4") or cache == "fp8+mxfp4":
        index_query = index_key = qat.fake_index_vector
    fp8_weights = policy.weights == "fp8"
    expert: Callable[[Weight], Weight] = as_it_is
    if simulates("expert_fp4"):  # which FP8 holds exactly
        expert = _Bound(_fp4_expert, (policy.param_dtype,))
    elif fp8_weights:
        expert = _Bound(_fp8_expert, (policy.param_dtype,))
    return Grids(
        activation=qat.fake_activation if simulates("act_fp8") else as_it_is,
        entry=entry,
        index_query=index_query,
        index_key=index_key,
        score=qat.to_bfloat16 if simulates("idx_score_bf16") else as_it_is,
        expert=expert,
        weight=qat.fake_fp8_weight if fp8_weights else as_it_is,
        compressor_dtype=jnp.dtype("float32") if simulates("compressor_fp32") else None,
    )


def _fp4_expert(weight: Weight, dtype: np.dtype) -> jax.Array:
    return qat.fake_mxfp4(plain(weight, dtype))


def _fp8_expert(weight: Weight, dtype: np.dtype) -> jax.Array:
    return qat.fake_fp8_weight(plain(weight, dtype))


def _fp8_key(key: jax.Array) -> jax.Array:
    return cache_formats.round_keys(qat.hadamard(key), "fp8+fp8")
