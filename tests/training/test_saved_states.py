"""Saved states: what comes back, on which devices, and what happens to damaged steps and bad disks."""

import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.keeping import save_for_good
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.saved_states import UNREADABLE_PREFIX, SavedStates, as_plain, checksums, named
from dsv4_jax.training.step import TrainState


def small_state(value=1.0, step=0):
    """A state of every kind of array that a run may hold."""
    rng = np.random.default_rng(int(value))
    trained = {
        "embed": jnp.asarray(rng.standard_normal((7, 5)), jnp.float32),
        "stacks": {0: {"wide": jnp.asarray(rng.standard_normal((3, 4)), jnp.bfloat16)}},
        "codes": jnp.asarray(rng.standard_normal((4, 4)), jnp.float8_e4m3fn),
    }
    fixed = {"bias": jnp.full((3,), value, jnp.float32), "table": jnp.arange(6, dtype=jnp.int32)}
    return TrainState(trained, fixed, (jnp.int32(step), {"mu": trained["embed"] * 2}), jnp.int32(step))


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_every_array_comes_back_bit_for_bit(tmp_path):
    saved = SavedStates(tmp_path / "states", 2)
    assert saved.restore(small_state()) is None
    for step in (1, 2, 3):
        saved.save(small_state(step, step), {"data": {"next": step}})
    saved.wait()
    assert saved.steps() == [2, 3]
    restored = SavedStates(tmp_path / "states", 2).restore(small_state())
    assert restored.about["data"] == {"next": 3} and restored.about["step"] == 3 and not restored.problems
    assert_equal(restored.state, small_state(3, 3))


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    """Saved in the background; the step after it overwrites the buffers that were saved."""

    @functools.partial(jax.jit, donate_argnums=0)
    def following(state):
        return jax.tree.map(lambda leaf: leaf + 1, state)

    rows = {str(i): jnp.zeros((200, 300), jnp.float32) for i in range(8)}
    state = TrainState(rows, {}, (), jnp.int32(0))
    saved = SavedStates(tmp_path / "states", 30)
    for _ in range(5):
        state = following(state)
        saved.save(state, {})
        state = following(following(state))
    saved.wait()
    for step in saved.steps():
        found = saved._manager.restore(step)["state"]
        assert all((np.asarray(leaf) == step).all() for leaf in found.values()), step
    saved.close()


def damage(folder, how):
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    target = files[-1]
    if how == "cut short":
        os.truncate(target, target.stat().st_size // 2)
    elif how == "another bit":
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 4
        target.write_bytes(data)
    elif how == "no files":
        shutil.rmtree(folder / "state")
    elif how == "no record":
        next(folder.glob("about/metadata")).write_text("{")


@pytest.mark.parametrize("how", ["cut short", "another bit", "no files", "no record"])
def test_a_damaged_step_is_named_and_the_one_before_is_used(tmp_path, how):
    saved = SavedStates(tmp_path / "states", 2)
    for step in (4, 8):
        saved.save(small_state(step, step), {})
    saved.close()
    damage(tmp_path / "states" / "8", how)
    saved = SavedStates(tmp_path / "states", 2)
    restored = saved.restore(small_state())
    assert restored.about["step"] == 4 and len(restored.problems) == 1
    assert f"{tmp_path}/states/8" in restored.problems[0]
    assert_equal(restored.state, small_state(4, 4))
    assert (tmp_path / "states" / f"{UNREADABLE_PREFIX}8").is_dir()
    saved.save(small_state(8, 8), {})  # the same number comes again
    saved.wait()
    assert saved.steps() == [4, 8]
    assert_equal(saved.restore(small_state()).state, small_state(8, 8))


def test_an_array_that_reads_well_and_is_not_what_was_saved(tmp_path):
    saved = SavedStates(tmp_path / "states", 2)
    saved.save(small_state(4, 4), {})
    saved.save(small_state(8, 8), {"checksums": {name: 0 for name in named(small_state())}})
    saved.close()
    restored = SavedStates(tmp_path / "states", 2).restore(small_state())
    assert restored.about["step"] == 4 and "checksum" in restored.problems[0]


def test_when_nothing_can_be_read_all_steps_are_named(tmp_path):
    saved = SavedStates(tmp_path / "states", 2)
    for step in (1, 2):
        saved.save(small_state(step, step), {})
    saved.close()
    for step in (1, 2):
        damage(tmp_path / "states" / str(step), "no files")
    with pytest.raises(ProblemsError, match="no saved state can be read") as refused:
        SavedStates(tmp_path / "states", 2).restore(small_state())
    assert len(refused.value.problems) == 2


def test_the_state_of_another_model_is_refused_and_stays(tmp_path):
    saved = SavedStates(tmp_path / "states", 2)
    saved.save(small_state(1, 1), {})
    saved.wait()
    other = small_state()
    other.trained["more"] = jnp.zeros(3)
    with pytest.raises(ProblemsError, match="another model or optimizer") as refused:
        saved.restore(other)
    assert "trained/more" in str(refused.value)

    def never(about):
        raise ProblemsError("the saved state belongs to another run", ["seed"])

    with pytest.raises(ProblemsError, match="another run"):
        saved.restore(small_state(), never)
    assert saved.steps() == [1]


def test_a_disk_that_takes_nothing_leaves_the_last_step_and_the_state(tmp_path, monkeypatch):
    """Every write fails from some moment on; the step before stays, and later saves work again."""
    saved = SavedStates(tmp_path / "states", 2)
    saved.save(small_state(1, 1), {})
    saved.wait()
    folder = tmp_path / "states"
    shutil.move(folder, tmp_path / "kept")
    folder.write_text("in the way")  # also for root, whom no permission bits stop
    state = small_state(2, 2)
    with pytest.raises(ProblemsError) as refused:
        saved.save(state, {})
        saved.wait()
    assert str(folder) in str(refused.value)
    with pytest.raises(ProblemsError, match="is in .*unsaved") as moved:
        save_for_good(saved, state, {}, {}, tmp_path / "out", started=False)
    place = next(tmp_path.glob("out-unsaved-*"))
    assert str(place) in str(moved.value)
    assert_equal(SavedStates(place / "checkpoints", 1).restore(small_state()).state, state)
    folder.unlink()
    shutil.move(tmp_path / "kept", folder)
    again = SavedStates(folder, 2)
    assert again.steps() == [1]


def test_checksums_see_every_bit_and_place_and_no_mesh():
    array = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
    sums = {name: int(each) for name, each in checksums({"a": array}).items()}
    words = np.asarray(array).view(np.uint32).reshape(-1).astype(np.uint64)
    places = np.arange(48, dtype=np.uint64)
    odd = (places * np.uint64(2654435761) * np.uint64(2) + np.uint64(1)) % np.uint64(2**32)
    assert sums["a"] == int((words * odd).sum() % np.uint64(2**32))
    changed = array.at[3, 4].set(jnp.nextafter(array[3, 4], jnp.float32(9)))
    swapped = array.at[0, 0].set(array[0, 1]).at[0, 1].set(array[0, 0])
    for other in (changed, swapped):
        assert int(checksums({"a": other})["a"]) != sums["a"]
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.device_put(array, jax.NamedSharding(mesh, jax.P("x")))
    assert int(checksums({"a": split})["a"]) == sums["a"]
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8, jnp.int32, jnp.bool_, jnp.uint32):
        checksums({"a": jnp.ones((3,), dtype), "b": jnp.ones((), dtype), "c": jnp.ones((0, 2), dtype)})


@pytest.mark.parametrize(("before", "after"), [(("x", 8), ("y", 2)), (None, ("x", 4)), (("y", 4), None)])
def test_another_mesh_reads_the_same_bits(tmp_path, before, after):
    def placed(state, split):
        if split is None:
            return jax.device_put(state, jax.devices()[0])
        mesh = jax.make_mesh((split[1],), (split[0],), devices=jax.devices()[: split[1]])
        specs = {True: jax.P(split[0]), False: jax.P()}
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, specs[leaf.shape[:1] == (8,)])), state
        )

    rng = np.random.default_rng(0)
    trained = {name: rng.standard_normal((8, 3)).astype(np.float32) for name in "ab"}
    host = TrainState(trained, {"bias": np.ones(3, np.float32)}, (trained["a"] * 2,), np.int32(5))
    other = placed(jax.tree.map(np.zeros_like, host), after)
    saved = SavedStates(tmp_path / "states", 1)
    saved.save(placed(host, before), {})
    saved.wait()
    restored = saved.restore(other).state
    assert_equal(restored, host)
    for got, place in zip(jax.tree.leaves(restored), jax.tree.leaves(other), strict=True):
        assert got.sharding == place.sharding


def test_configurations_as_plain_values():
    assert as_plain(AdamW(beta1=0.5)) == {
        "kind": "AdamW", "beta1": 0.5, "beta2": 0.95, "epsilon": 1e-20, "weight_decay": 0.1,
        "max_grad_norm": 1.0,
    }  # fmt: skip
    plain = as_plain(Policy.of("float32", "qat"))
    assert plain["param_dtype"] == "float32" and plain["switches"] == sorted(plain["switches"])
