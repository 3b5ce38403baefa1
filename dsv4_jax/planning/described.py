"""Slices that libtpu describes to its compiler: devices that programs are made for, and that nobody has."""

import functools
import importlib.util
import os
import warnings
from typing import Any

import jax

from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning.slices import Slice
from sharding.activations import Placement
from sharding.mesh import MeshError, mesh_of
from sharding.rules import RuleTable

SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment variables that libtpu reads when it is loaded; without them it looks for a cloud machine's
metadata, and only one process of a machine may load it. Values that are set already stay."""


def devices(place: Slice) -> tuple[jax.Device, ...]:
    """The devices of a slice, for compilers and meshes; nothing runs on them.

    Raises:
        ProblemsError: without libtpu, or for a slice that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        why = "the TPU compiler (libtpu) is not installed; pip install 'dsv4_jax[plan]' brings it, on Linux"
        raise ProblemsError("cannot compile for a slice", [why])
    return _described(str(place))


@functools.cache
def _described(name: str) -> tuple[jax.Device, ...]:
    from jax.experimental import topologies

    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about hosts that are not there
            return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as failure:  # what libtpu says of a name has no type of its own
        said = " ".join(str(failure).split())[:300]
        why = f"slice {name}: the TPU compiler that is installed does not describe it: {said}"
        raise ProblemsError("cannot compile for a slice", [why]) from failure


def placement_on(place: Slice, mesh: str, table: RuleTable) -> Placement:
    """A mesh over the devices of a slice, and the rules of a use of the model.

    Raises:
        ProblemsError: as `devices`; for a spelling that is no mesh of these devices.
    """
    try:
        return Placement(mesh_of(mesh, devices(place)), table)
    except MeshError as refused:
        raise ProblemsError(refused.what, refused.problems) from refused


def version() -> str:
    """Of libtpu, as it is installed."""
    from importlib import metadata

    return metadata.version("libtpu")


def on_a_device(leaf: Any) -> int:
    """Bytes of one device's part of an array, padding left out.

    Args:
        leaf: with a shape, a dtype and a sharding, such as a `jax.ShapeDtypeStruct`.
    """
    count = 1
    for size in leaf.sharding.shard_shape(leaf.shape):
        count *= size
    return count * leaf.dtype.itemsize
