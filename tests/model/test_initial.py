"""Initial values are drawn by boxes: the same numbers however a model is split, one box at a time."""

import os
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest

from dsv4_jax import boxes
from dsv4_jax.config import tiny
from dsv4_jax.errors import ProblemsError
from dsv4_jax.model.initial import initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import INITIAL_VALUE, parameters

CONFIG = tiny(11)  # four repeats of a scanned unit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("piece", [777, boxes.PIECE_ELEMENTS])
def test_values_are_one_stream_however_it_is_cut_into_pieces(dtype, piece, monkeypatch):
    monkeypatch.setattr(boxes, "PIECE_ELEMENTS", piece)
    policy = Policy.of(dtype)
    drawn = initial_parameters(CONFIG, policy, 7)
    kinds = set()
    for path, parameter in parameters(CONFIG).items():
        value = drawn
        for key in path:
            value = value[key]
        assert value.shape == parameter.shape and value.dtype == parameter.dtype(policy.param_dtype)
        kinds.add(parameter.role)
        if parameter.role in INITIAL_VALUE:
            assert (np.asarray(value) == np.float32(INITIAL_VALUE[parameter.role])).all()
        elif parameter.role == "table":
            for table in np.asarray(value):
                assert all(len(set(row)) == CONFIG.num_experts_per_tok for row in table.tolist())
                used = np.bincount(table.ravel(), minlength=CONFIG.n_routed_experts)
                assert used.max() - used.min() <= 1
        else:
            stream = np.random.default_rng([7, zlib.crc32("/".join(map(str, path)).encode())])
            expected = stream.standard_normal(parameter.shape, np.float32)
            expected = (expected * np.float32(CONFIG.initializer_range)).astype(value.dtype)
            assert np.asarray(value).tobytes() == expected.tobytes(), path
    assert {"norm", "expert", "embedding", "mixing_gate"} <= kinds


def test_rules_that_do_not_fit_are_refused():
    mesh = jax.sharding.AbstractMesh((3,), ("expert",))
    with pytest.raises(ProblemsError, match="cannot place the parameters of a new model") as refused:
        initial_parameters(CONFIG, Policy.of(), 0, mesh, {"E": "expert", "Q": "x"})
    message = "\n".join(refused.value.problems)
    assert f"E = {CONFIG.n_routed_experts} cannot be split 3 ways" in message and "no axis 'x'" in message
    with pytest.raises(ProblemsError, match="rules are given, but no mesh"):
        initial_parameters(CONFIG, Policy.of(), 0, rules={"E": "expert"})


# A process of its own: the number of host devices is fixed when JAX starts.
ON_EIGHT_DEVICES = """
import math
import jax, numpy as np
from jax.sharding import AxisType
from dsv4_jax import LanguageModel, Policy, boxes, tiny
from dsv4_jax.model import initial

boxes.PIECE_ELEMENTS = 777
sizes, aligned = [], initial.aligned
initial.aligned = lambda shape, dtype: sizes.append(math.prod(shape)) or aligned(shape, dtype)
config, policy = tiny(11), Policy.of("bfloat16")
one = jax.tree.leaves(LanguageModel.random(config, policy, 3).parameters)
assert sorted(sizes) == sorted(a.size for a in one)
mesh = jax.make_mesh((2, 2, 2), ("expert", "tensor", "data"), axis_types=(AxisType.Auto,) * 3)
for rules in (
    {},
    {"E": "expert", "V": ("tensor", "data"), "G": "tensor"},
    {"V": "data", "Ke": "tensor", "D": ("data", "tensor"), "F": "data", "Dh": "tensor"},
):
    sizes.clear()
    model = LanguageModel.random(config, policy, 3, mesh=mesh, rules=rules)
    many = jax.tree.leaves(model.parameters)
    boxes_of = [{str(s.index): s.data.size for s in a.addressable_shards} for a in many]
    assert sorted(sizes) == sorted(size for found in boxes_of for size in found.values())  # each box once
    for a, b in zip(one, many, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    print("compared", len(one), sum(not a.sharding.is_fully_replicated for a in many))
"""


def test_a_model_drawn_on_a_mesh_is_the_one_of_one_device():
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    ran = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    split = [int(line.split()[2]) for line in ran.stdout.splitlines()]
    assert len(split) == 3 and split[0] == 0 and all(number > 10 for number in split[1:])
