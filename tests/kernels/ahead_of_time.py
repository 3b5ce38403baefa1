"""Compiling for TPUs that nobody here has: libtpu's compiler needs a description, not a chip."""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
"""One topology a generation; kernels use only its first device."""

SLICES = CHIPS | {"v6e 4x4": "v6e:4x4"}
"""Those, and a slice for meshes."""

# libtpu reads these when it is loaded; without them it looks for a cloud machine's metadata.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@functools.cache
def devices(chip: str) -> tuple[jax.Device, ...]:
    """The devices of a described slice."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu (Linux, extra `test`)")
    from jax.experimental import topologies

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=SLICES[chip]).devices)


def compile_for(chip: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> Any:
    """The compiled program of `function` for one device of `chip`; raises what the compiler raises."""
    mesh = jax.sharding.Mesh(np.array(devices(chip)[:1]), ("x",))
    return compile_on(function, shapes, [jax.sharding.NamedSharding(mesh, jax.P())] * len(shapes))


def compile_on(
    function: Callable[..., Any],
    shapes: Sequence[jax.ShapeDtypeStruct],
    shardings: Sequence[jax.sharding.Sharding],
) -> Any:
    """As `compile_for`, for the devices of these shardings, one an argument."""
    placed = [
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    return compiled(jax.jit(function).lower(*placed))


def compiled(lowered: jax.stages.Lowered) -> Any:
    """The program, compiled as it would be for its chip, not as quickly as other tests' programs. One for a
    chip that is not here cannot be read back from the cache of compiled programs."""
    settings = {"jax_enable_compilation_cache": False, "jax_disable_most_optimizations": False}
    before = {name: jax.config.values[name] for name in settings}
    _update(settings)
    compilation_cache.reset_cache()
    try:
        return lowered.compile()
    finally:
        _update(before)
        compilation_cache.reset_cache()


def _update(settings: dict[str, bool]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
