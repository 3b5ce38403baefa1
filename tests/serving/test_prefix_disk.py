"""Prefixes on disk: after a restart as before it, and never from a file that is not whole."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.fingerprint import model_fingerprint
from dsv4_jax.serving.prefix_disk import PrefixDisk, Shapes
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.models import compressed_kinds
from tests.serving.test_core import nothing_compiled

ARRAYS = [
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.array([1.5, -2], ml_dtypes.bfloat16),
    np.array([[0.5, 3]], ml_dtypes.float8_e4m3fn),
    np.array(7, np.int32),
]
KEYS = [bytes([number]) * 32 for number in range(5)]


def disk(folder, most_bytes=1 << 20):
    return PrefixDisk(folder, most_bytes, Shapes.of(ARRAYS), Shapes.of(ARRAYS[:1]))


def test_arrays_come_back_bit_for_bit_and_torn_files_do_not(tmp_path):
    kept = disk(tmp_path)
    assert kept.write("block", KEYS[0], ARRAYS)
    for got, wanted in zip(disk(tmp_path).read("block", KEYS[0]), ARRAYS, strict=True):
        assert got.dtype == wanted.dtype and got.tobytes() == wanted.tobytes() and got.shape == wanted.shape
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    for content in (b"", whole[:-1], bytes(changed), b"x" + whole[1:], whole + b"x"):
        path.write_bytes(content)
        assert kept.read("block", KEYS[0]) is None
        assert not path.exists()
    assert kept.damaged == 5
    assert kept.read("block", KEYS[0]) is None and kept.damaged == 5


def test_a_file_of_other_shapes_is_not_taken(tmp_path):
    disk(tmp_path).write("block", KEYS[0], ARRAYS)
    turned = [ARRAYS[0].T, *ARRAYS[1:]]
    other = PrefixDisk(tmp_path, 1 << 20, Shapes.of(turned), Shapes.of(ARRAYS[:1]))
    assert other.read("block", KEYS[0]) is None


def test_a_run_of_blocks(tmp_path):
    kept = disk(tmp_path)
    for number in (0, 1, 3):
        kept.write("block", KEYS[number], ARRAYS)
    assert [kept.reach(KEYS, first) for first in range(5)] == [2, 2, 2, 4, 4]


def test_the_folder_is_bounded_and_the_oldest_goes(tmp_path):
    kept = disk(tmp_path)
    kept.write("block", KEYS[0], ARRAYS)
    (path,) = tmp_path.iterdir()
    size = path.stat().st_size
    kept = disk(tmp_path, 3 * size)
    for age, number in enumerate((1, 2)):
        kept.write("block", KEYS[number], ARRAYS)
        os.utime(tmp_path / f"{KEYS[number].hex()}.block", (age, age))
    kept.read("block", KEYS[1])  # used: number 2 is the oldest now
    kept.write("block", KEYS[3], ARRAYS)
    assert [kept.has("block", key) for key in KEYS] == [True, True, False, True, False]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * size


def test_files_of_others_stay(tmp_path):
    (tmp_path / "thesis.txt").write_bytes(b"x" * 10_000)
    os.utime(tmp_path / "thesis.txt", (1, 1))
    kept = disk(tmp_path, most_bytes=120)
    assert kept.write("block", KEYS[0], ARRAYS) and kept.write("block", KEYS[1], ARRAYS)
    assert (tmp_path / "thesis.txt").exists()
    assert [kept.has("block", key) for key in KEYS[:2]] == [False, True]


def test_a_disk_that_is_full_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    kept = disk(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not kept.write("block", KEYS[0], ARRAYS)
    assert "No space left" in caplog.text and not list(tmp_path.iterdir())


# ---- with an engine -------------------------------------------------------------------------------

SIZES = EngineSettings(
    max_length=64, num_slots=3, num_lanes=2, chunk=4, num_pages=64, num_states=40, state_interval=8
)
CONFIG = compressed_kinds(initializer_range=0.3)
PROMPT = tuple(np.random.default_rng(0).integers(0, 300, 30).tolist())


def ask(core, ids=PROMPT):
    number = core.add(ids, Sampling(max_tokens=6, seed=2, ignore_eos=True))
    tokens, cached = [], 0
    while core.has_work:
        for each, output in core.step():
            assert each == number
            tokens += output.token_ids
            cached += output.cached_tokens
    core.prefixes.check()
    return tokens, cached


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.random(CONFIG, Policy.of("float32"))


def test_prefixes_outlive_the_engine_and_damage_is_noticed(lm, tmp_path, caplog):
    sizes = dataclasses.replace(SIZES, disk=tmp_path)
    first = EngineCore(lm, sizes)
    cold, cached = ask(first)
    assert cached == 0
    first.close()
    again = EngineCore(lm, sizes)
    again.warm_up()
    with nothing_compiled():
        assert ask(again) == (cold, 28)
    again.close()
    # The state at the end is gone: the one at 24 tokens serves.
    newest = again.prefixes.keys(PROMPT)[6]
    (tmp_path / f"{newest.hex()}.state").write_bytes(b"torn")
    torn = EngineCore(lm, sizes)
    assert ask(torn) == (cold, 24) and "damaged" in caplog.text
    torn.close()
    # A block in the middle is gone: nothing behind it counts.
    (tmp_path / f"{again.prefixes.keys(PROMPT)[3].hex()}.block").unlink()
    assert ask(EngineCore(lm, sizes)) == (cold, 8)


def test_other_weights_find_nothing(lm, tmp_path):
    sizes = dataclasses.replace(SIZES, disk=tmp_path)
    core = EngineCore(lm, sizes)
    ask(core)
    core.close()
    other = jax.tree.map(lambda leaf: leaf, lm.parameters)
    other["embed"] = lm.parameters["embed"].at[299, 0].add(jnp.float32(1e-3))
    changed = LanguageModel(CONFIG, lm.policy, other)
    assert ask(EngineCore(changed, sizes))[1] == 0
    assert ask(EngineCore(lm, sizes))[1] == 28


def test_the_fingerprint_sees_every_place(lm):
    wanted = model_fingerprint(lm, None, with_weights=True)
    assert wanted == model_fingerprint(lm, None, with_weights=True)
    swapped = jax.tree.map(lambda leaf: leaf, lm.parameters)
    swapped["embed"] = lm.parameters["embed"][::-1]
    for parameters in (swapped,):
        assert (
            model_fingerprint(LanguageModel(CONFIG, lm.policy, parameters), None, with_weights=True) != wanted
        )
    quantised = LanguageModel(CONFIG, Policy.of("float32", cache="fp8+fp8"), lm.parameters)
    assert model_fingerprint(quantised, None, with_weights=True) != wanted
