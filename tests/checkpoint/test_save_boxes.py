"""Saving fetches one tensor at a time, from whatever shards hold it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.boxes import Box, shape_of, whole
from dsv4_jax.checkpoint import held, storage
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.names import official_tensors
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.errors import CheckpointError, ProblemsError
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic


@dataclasses.dataclass(frozen=True)
class Split:
    """Stands for an array that is split over devices, and that must not be fetched as a whole."""

    array: np.ndarray
    boxes: tuple[Box, ...]

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def addressable_shards(self):
        return [types.SimpleNamespace(index=b, data=jnp.asarray(self.array[b])) for b in self.boxes]

    def __array__(self, *_, **__):
        raise AssertionError(f"all {self.shape} of a split array were fetched")


def rows_of(array, parts, axis=0):
    """A split array of equal parts of one axis, the first of them twice, as replicas are."""
    every = np.array_split(np.arange(array.shape[axis]), parts)
    everything = (slice(None),) * axis
    boxes = [(*everything, slice(int(i[0]), int(i[-1]) + 1), *whole(array.shape[axis + 1 :])) for i in every]
    return Split(array, (boxes[0], *boxes))


@pytest.mark.parametrize("in_host_memory", [True, False])
def test_a_part_is_the_slice_of_the_whole(monkeypatch, in_host_memory):
    monkeypatch.setattr(held, "_in_host_memory", lambda data: in_host_memory)
    numbers = np.arange(7 * 6 * 10, dtype=np.float32).reshape(7, 6, 10)
    cases = [
        numbers,
        rows_of(numbers, 1),
        rows_of(numbers, 3),
        rows_of(numbers, 4, axis=1),
        rows_of(numbers.astype(ml_dtypes.bfloat16), 5, axis=2),
        rows_of((numbers % 251).astype(np.uint8).view(ml_dtypes.float8_e4m3fn), 2, axis=1),
    ]

    @settings(max_examples=100 if in_host_memory else 25, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def check(data):
        array = data.draw(st.sampled_from(range(len(cases))).map(cases.__getitem__))
        box = []
        for size in array.shape:
            start = data.draw(st.integers(0, size - 1))
            box.append(slice(start, data.draw(st.integers(start + 1, size))))
        found = held.part(array, tuple(box))
        full = array.array if isinstance(array, Split) else array
        assert found.dtype == full.dtype and found.shape == shape_of(tuple(box))
        assert found.tobytes() == full[tuple(box)].tobytes()

    check()


def test_what_other_processes_hold_cannot_be_fetched():
    array = np.arange(12.0).reshape(6, 2)
    split = rows_of(array, 3)
    here = dataclasses.replace(split, boxes=split.boxes[:-1])
    np.testing.assert_array_equal(held.part(here, (slice(1, 4), slice(1, 2))), array[1:4, 1:2])
    with pytest.raises(ProblemsError, match="1 of 4 numbers are on devices of other processes"):
        held.part(here, (slice(1, 5), slice(1, 2)))


@pytest.fixture(scope="module", params=[storage.PLAIN, storage.PREVIEW], ids=["plain", "native"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    synthetic.write_checkpoint(folder, synthetic.repeated_config(), request.param)
    return load_checkpoint(folder, Policy.of("bfloat16"), weights="native")


def split_everywhere(parameters, parts=2):
    def split(leaf):
        array = np.asarray(leaf)
        axis = int(np.argmax(array.shape))
        return rows_of(array, parts, axis) if array.shape[axis] >= parts else array

    return jax.tree.map(split, parameters)


@pytest.mark.parametrize("to", [None, storage.PREVIEW, storage.BASE], ids=["as_held", "fp8-fp4", "fp8"])
def test_no_more_than_a_tensor_is_fetched_at_once(tmp_path, monkeypatch, loaded, to):
    sizes, part = [], held.part

    def counted(array, box):
        found = part(array, box)
        sizes.append(found.size)
        return found

    def save(name, parameters):
        save_checkpoint(tmp_path / name, loaded.config, parameters, stored=loaded.stored, release=to)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    expected = save("whole", loaded.parameters)
    monkeypatch.setattr(held, "part", counted)
    assert save("split", split_everywhere(loaded.parameters)) == expected
    largest = max(int(np.prod(spec.shape)) for spec in official_tensors(loaded.config))
    assert max(sizes) == largest
    assert max(leaf.size for leaf in jax.tree.leaves(loaded.parameters)) > largest


def test_parameters_of_which_a_part_is_elsewhere_are_refused(tmp_path, loaded):
    split = rows_of(np.asarray(loaded.parameters["embed"]), 2)
    elsewhere = dataclasses.replace(split, boxes=split.boxes[:-1])
    with pytest.raises(CheckpointError, match=r"embed: \d+ of \d+ numbers are on devices of other processes"):
        save_checkpoint(tmp_path / "saved", loaded.config, loaded.parameters | {"embed": elsewhere})
    assert not (tmp_path / "saved").exists()
