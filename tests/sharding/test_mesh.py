"""Spellings of meshes, the five axes, and what is said of meshes that cannot be."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from sharding.mesh import AXES, MeshError, described, mesh_of, parse, spelled
from tests.kernels import ahead_of_time

DEVICES = jax.devices()


def test_a_spelling_names_axes_and_sizes():
    assert parse("expert=8,tensor=2") == {"expert": 8, "tensor": 2}
    assert parse(" data = 2 , context=1") == {"data": 2, "context": 1}


@given(st.dictionaries(st.sampled_from(AXES), st.integers(1, 64), min_size=1))
def test_what_is_spelled_is_read_back(sizes):
    mesh = described(",".join(f"{axis}={size}" for axis, size in sizes.items()))
    assert dict(mesh.shape) == {axis: sizes.get(axis, 1) for axis in AXES}
    assert dict(described(spelled(mesh)).shape) == dict(mesh.shape)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["'' is not axis=size"]),
        ("expert", ["'expert' is not axis=size"]),
        ("experts=8", ["no axis 'experts', only data, fsdp, expert, tensor, context"]),
        ("expert=0", ["expert=0: the size must be an integer >= 1"]),
        ("expert=-2", ["expert=-2: the size must be an integer >= 1"]),
        ("expert=two", ["expert=two: the size must be"]),
        ("expert=2,expert=2", ["axis expert is named twice"]),
        ("rows=2,expert=x,,data=2", ["no axis 'rows'", "expert=x", "'' is not axis=size"]),
    ],
)
def test_a_bad_spelling_is_refused_with_all_its_problems(text, says):
    with pytest.raises(MeshError) as refused:
        parse(text)
    for each in [*says, "spelled like expert=8,tensor=2"]:
        assert each in str(refused.value)


def test_every_axis_is_there():
    mesh = mesh_of("expert=4,tensor=2")
    assert mesh.axis_names == AXES and dict(mesh.shape) == dict(data=1, fsdp=1, expert=4, tensor=2, context=1)
    assert mesh_of({"expert": 4, "tensor": 2}) == mesh
    assert dict(mesh_of({}).shape) == dict.fromkeys(AXES, 1)


def test_fewer_devices_than_there_are():
    assert list(mesh_of("data=3").devices.flat) == DEVICES[:3]


def test_more_devices_than_there_are_names_what_would_do():
    with pytest.raises(MeshError) as refused:
        mesh_of("expert=8,tensor=2", DEVICES[:8])
    message = str(refused.value)
    assert "expert=8,tensor=2 takes 16 devices, and there are 8" in message
    assert "try expert=8,tensor=1" in message and "try expert=4,tensor=2" in message


def test_a_mesh_of_some_axes_gets_the_others():
    grid = np.array(DEVICES[:8]).reshape(4, 2)
    mesh = mesh_of(Mesh(grid, ("tensor", "expert")))
    assert mesh.axis_names == AXES and mesh.shape["expert"] == 2 and mesh.shape["tensor"] == 4
    assert (mesh.devices.reshape(2, 4) == grid.T).all()
    assert mesh_of(mesh) is mesh


def test_a_mesh_with_other_axes_is_refused():
    with pytest.raises(MeshError, match=r"no axes \['x'\], only data, fsdp"):
        mesh_of(Mesh(np.array(DEVICES[:2]), ("x",)))


class Process:
    """A device of a process, for meshes over several."""

    def __init__(self, index):
        self.process_index = index


def test_several_processes_use_all_their_devices():
    with pytest.raises(MeshError, match="data=2 takes 2 devices, and there are 4, all of which"):
        mesh_of("data=2", [Process(0), Process(0), Process(1), Process(1)])


@pytest.mark.parametrize(
    "spelling", ["expert=16", "expert=8,tensor=2", "data=2,expert=2,tensor=4", "context=16"]
)
def test_axes_of_any_size_on_a_square_of_chips(spelling):
    """An axis may take a part of one side of the slice."""
    chips = ahead_of_time.devices("v6e 4x4")
    mesh = mesh_of(spelling, chips)
    assert dict(mesh.shape) == dict(described(spelling).shape)
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in chips)
