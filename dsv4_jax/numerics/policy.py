"""Which numbers a model computes with: one frozen `Policy`, decided once."""

import dataclasses
from collections.abc import Collection
from typing import Literal

import jax.numpy as jnp
import numpy as np

from dsv4_jax.config.rules import shown
from dsv4_jax.errors import ConfigError
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS, CacheFormat
from dsv4_jax.numerics.qat import SWITCHES

DTYPES = ("float32", "bfloat16")

KERNELS = {
    "xla": "plain XLA, any backend",
    "pallas": "Pallas kernels, TPU",
    "pallas-interpret": "the same kernels in the interpreter, any backend; slow, for tests",
}
"""What may compute the operations that have a kernel. A choice is never replaced by another."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes, numerics mode and recomputation of one model instance. Never changes its parameters' meaning.

    The float32 islands (norm statistics, RoPE, softmax, routing, mHC, head) are float32 in every policy;
    see the report, sections 2.4 and 3.3.
    """

    param_dtype: np.dtype  # matrices; norms, sinks, mHC and biases are always float32
    compute_dtype: np.dtype  # activations and matmul inputs; accumulation is float32
    cache_dtype: np.dtype  # of a plain cache: window rows, compressed entries, indexer keys; raw rows
    numerics: Literal["reference", "qat"] = "reference"
    remat: Literal["none", "unit"] = "none"  # 'unit': recompute each repeated unit of layers in backward
    kernels: Literal["xla", "pallas", "pallas-interpret"] = "xla"  # see KERNELS
    switches: frozenset[str] = frozenset()  # the active parts of the simulation, see qat.SWITCHES
    cache_format: CacheFormat = "plain"  # see numerics.cache_formats
    weights: Literal["plain", "fp8"] = "plain"  # 'fp8': products see plain matrices rounded, for training

    @property
    def row_dtype(self) -> np.dtype:
        """Of the compressors' raw rows: what their matmuls give."""
        return jnp.dtype("float32") if self.simulates("compressor_fp32") else self.cache_dtype

    def simulates(self, switch: str) -> bool:
        """Whether this part of the quantisation simulation is active."""
        return switch in self.switches

    @staticmethod
    def of(
        dtype: str = "bfloat16",
        numerics: str = "reference",
        remat: str = "none",
        kernels: str = "xla",
        switches: Collection[str] | None = None,
        cache: str = "plain",
        master: str | None = None,
        weights: str = "plain",
    ) -> "Policy":
        """The usual policy: one dtype for parameters, activations and cache.

        Args:
            dtype: "bfloat16" or "float32".
            numerics: "reference", or "qat" for the official quantisation simulation.
            remat: "none" or "unit".
            kernels: one of KERNELS.
            switches: parts of the simulation, of `qat.SWITCHES`; None means all of them with "qat".
            cache: "plain", "fp8+fp8" or "fp8+mxfp4" (`numerics.cache_formats`).
            master: dtype of the matrices where it is not that of the activations: "float32" beside "bfloat16"
                is training with float32 masters. Products round them to the activations' dtype.
            weights: "plain", or "fp8": products see matrices on the grid of FP8 by 128 x 128, and gradients
                pass straight to what was rounded; with the switch act_fp8 this is training with FP8 products.

        Raises:
            ConfigError: for unknown choices, switches without "qat", or parts that have no kernel; all
                problems at once.
        """
        problems = []
        try:
            name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        except TypeError:  # no dtype at all
            name = shown(dtype)
        if name not in DTYPES:
            problems.append(f"dtype={name!r} must be one of {', '.join(DTYPES)}")
        if numerics not in ("reference", "qat"):
            problems.append(f"numerics={numerics!r} must be 'reference' or 'qat'")
        if switches is None:
            switches = SWITCHES if numerics == "qat" else ()
        elif numerics != "qat":
            problems.append(f"switches={sorted(switches)} need numerics='qat'")
        if unknown := sorted(set(switches) - SWITCHES.keys()):
            problems.append(f"switches={unknown} must be among {', '.join(SWITCHES)}")
        if kernels != "xla" and "idx_score_bf16" in switches:
            problems.append(f"kernels={kernels!r} cannot compute idx_score_bf16: leave that switch out")
        if remat not in ("none", "unit"):
            problems.append(f"remat={remat!r} must be 'none' or 'unit'")
        if kernels not in KERNELS:
            problems.append(f"kernels={kernels!r} must be one of {', '.join(KERNELS)}")
        if master is not None and master not in DTYPES:
            problems.append(f"master={master!r} must be one of {', '.join(DTYPES)}")
        if weights not in ("plain", "fp8"):
            problems.append(f"weights={weights!r} must be 'plain' or 'fp8'")
        if cache not in CACHE_FORMATS:
            problems.append(f"cache={cache!r} must be one of {', '.join(CACHE_FORMATS)}")
        if cache == "fp8+fp8" and "idx_hadamard_fp4" in switches:
            problems.append(
                "cache='fp8+fp8' keeps FP8 keys and idx_hadamard_fp4 makes FP4 ones: leave one out"
            )
        if problems:
            raise ConfigError("cannot build this numerics policy", problems)
        chosen = jnp.dtype(name)
        held = chosen if master is None else jnp.dtype(master)
        kinds = (numerics, remat, kernels, frozenset(switches), cache, weights)
        return Policy(held, chosen, chosen, *kinds)  # type: ignore[arg-type]
