"""Steps compiled for described slices: the compiler's bytes beside the formulas, and refusals."""

import dataclasses

import jax
import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning import described
from dsv4_jax.planning.compiled import compiled, whole_arrays
from dsv4_jax.planning.held import held
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.slices import Slice
from tests.models import all_kinds

V6E = Slice("v6e", (2, 2))


def full_width(layers=1):
    """The first layers of V4-Flash with few experts: what compiles in seconds."""
    flash = v4_flash()
    return dataclasses.replace(
        flash,
        attention_kinds=flash.attention_kinds[2 : 2 + layers],
        router_kinds=("learned",) * layers,
        n_routed_experts=8,
        num_nextn_predict_layers=0,
    )


@pytest.fixture(scope="module")
def decode():
    """A step of decode, compiled."""
    pytest.importorskip("libtpu")
    job = Job(full_width(), V6E, "decode", 8, 4096, "expert=4")
    texts = []
    return job, compiled(job, texts), texts[0]


@pytest.mark.slow
def test_bytes_of_arguments_are_those_of_the_formulas(decode):
    job, found, _ = decode
    said = held(job)
    assert found.arguments["weights"] == said.weights
    assert found.arguments["cache"] == pytest.approx(said.cache + said.state, rel=0.03)
    known = said.weights + said.cache + said.state
    assert found.argument_bytes == pytest.approx(known, rel=0.03)
    assert found.held_bytes >= found.argument_bytes


@pytest.mark.slow
def test_what_is_moved_goes_along_the_mesh(decode):
    job, found, text = decode
    assert set(found.moved_by_axes) == {"expert"} and found.moved_by_axes["expert"] > 0
    assert found.kernel_calls == text.count("tpu_custom_call") > 0
    assert found.compile_seconds > 0 and found.flops > 0 and found.xla_seconds > 0
    plain = found.to_json()
    assert plain["moved_by_axes"]["expert"] == sum(each["bytes"] for each in plain["moved"])
    assert max(each["num_bytes"] for each in plain["largest"]) == plain["largest"][0]["num_bytes"]


def test_whole_arrays_are_named_from_the_bound_on():
    mesh = jax.sharding.AbstractMesh((2,), ("x",))
    whole, split = (jax.sharding.NamedSharding(mesh, jax.P(*spec)) for spec in ((), ("x",)))
    large = {"a": jax.ShapeDtypeStruct((2**23,), "float32", sharding=whole)}
    others = {
        "split": jax.ShapeDtypeStruct((2**24,), "float32", sharding=split),
        "small": jax.ShapeDtypeStruct((2**23 - 1,), "float32", sharding=whole),
    }
    assert whole_arrays({"weights": large | others}) == {"weights['a']": 2**25}


def test_a_slice_that_the_compiler_does_not_know_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ProblemsError, match="v6e:3x5: the TPU compiler that is installed does not describe"):
        described.devices(Slice("v6e", (3, 5)))


def test_without_the_compiler_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(described.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProblemsError, match=r"libtpu\) is not installed; pip install 'dsv4_jax\[plan\]'"):
        described.devices(V6E)


def test_a_draft_is_refused():
    job = Job(all_kinds(), V6E, "decode", 8, 64, "expert=4", draft="mtp")
    with pytest.raises(ProblemsError, match="--draft mtp: --compile compiles the step without a draft"):
        compiled(job)
