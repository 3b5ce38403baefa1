"""Compiled steps: one jit each, and on a mesh of TPUs one whose exchanges run while other work does."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from sharding.activations import Placement
from sharding.dispatch_cost import ASYNCHRONOUS


class Step:
    """A function whose first argument is static and says where the rest is.

    On a mesh of TPUs it is compiled with the options `dispatch_cost.ASYNCHRONOUS`, which no other backend
    knows; everywhere else, and inside a jit of the user's, whose options are the user's, it is a plain jit.

    Args:
        function: to be compiled.
        settings: of `jax.jit`; the first argument must be among the static ones.
    """

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        functools.update_wrapper(self, function)
        self._plain = jax.jit(function, **settings)
        self._overlapping = jax.jit(function, **settings, compiler_options=ASYNCHRONOUS)

    def __call__(self, network: Any, *arguments: Any, **more: Any) -> Any:
        """What the function returns."""
        return self._for(network, (arguments, more))(network, *arguments, **more)

    def lower(self, network: Any, *arguments: Any, **more: Any) -> jax.stages.Lowered:
        """As of a jitted function."""
        return self._for(network, (arguments, more)).lower(network, *arguments, **more)

    def _cache_size(self) -> int:
        return self._plain._cache_size() + self._overlapping._cache_size()

    def _for(self, network: Any, arguments: Any) -> Any:
        if not _on_tpus(network.placement):
            return self._plain
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return self._plain if traced else self._overlapping


def compiled_step(**settings: Any) -> Callable[[Callable[..., Any]], Step]:
    """A decorator that makes a `Step` with these settings of `jax.jit`.

    Its first argument has an attribute `placement`, a `Placement` or None.
    """
    return functools.partial(Step, **settings)


def _on_tpus(placement: Placement | None) -> bool:
    if placement is None or not isinstance(placement.mesh, Mesh):
        return False
    return placement.mesh.devices.flat[0].platform == "tpu"
