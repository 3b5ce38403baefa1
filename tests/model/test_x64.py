"""With `jax_enable_x64` the model computes the same numbers: no type is left to JAX's default."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv4_jax.config import DSpark
from dsv4_jax.inference import steps
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.entries import Entries
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from pallas_kernels.indexer import xla as indexer_xla
from tests.model.equivalence import SMALL
from tests.model.telling_weights import telling_parameters
from tests.model.test_kernels import CONFIG as KERNEL_CONFIG

WIDE = ("int64", "uint64", "float64")
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5]], np.int32)


def inner_programs(value):
    """The jaxprs among the parameters of an operation, however deep in tuples."""
    if isinstance(value, tuple | list):
        for one in value:
            yield from inner_programs(one)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from inner_programs(value.jaxpr)


def wide_values(program) -> list[str]:
    """Operations whose result is 64 bits wide, but JAX's own counters of loops: weakly typed scalars."""
    found = []
    for operation in program.eqns:
        for result in operation.outvars:
            counter = getattr(result.aval, "weak_type", False) and result.aval.shape == ()
            if str(getattr(result.aval, "dtype", "")) in WIDE and not counter:
                found.append(f"{operation.primitive} -> {result.aval}")
        for value in operation.params.values():
            for inner in inner_programs(value):
                found += wide_values(inner)
    return found


def programs(network: Network):
    """The main programs of a model, as functions of its parameters."""
    policy, config = network.policy, network.config
    counts = np.full(1, IDS.shape[1], np.int32)

    def forward(parameters):
        return steps.mtp_logits(network, parameters, spans.from_start(IDS, counts))

    def generated(parameters):
        rows = policy.row_dtype, policy.cache_format, policy.kernels == "xla"
        slot = {"stream_dtype": policy.compute_dtype}
        cache = new_cache(config, 1, 64, policy.cache_dtype, 8, *rows, **slot)
        logits, _, cache = steps.extend_further(network, parameters, cache, IDS, counts)
        draw = (
            jax.random.key(0)[None],
            np.full(1, 0.7, np.float32),
            np.full(1, 0.9, np.float32),
            np.full(1, steps.RUNNING, np.int32),
            np.ones(1, np.int32),
        )
        return steps.decode(network, parameters, cache, logits[:, -1], *draw)

    def drafted(parameters):
        rows = policy.row_dtype, policy.cache_format, policy.kernels == "xla"
        cache = new_cache(config, 1, 64, policy.cache_dtype, 8, *rows, dspark=True)
        _, cache = steps.extend(network, parameters, cache, IDS, counts)
        draw = jax.random.key(0)[None], np.full(1, 0.7, np.float32), np.full(1, 0.9, np.float32)
        drafts, logits, _ = steps.draft_block(network, parameters, cache, np.ones(1, np.int32), *draw)
        token = steps.draw(network, logits[:, 0], draw[0], cache.length, *draw[1:])
        return steps.verify(network, parameters, cache, token, drafts, np.full(1, 4, np.int32), *draw)

    if config.dspark is not None:
        return (drafted,)

    def trained(parameters):
        batch = Batch(IDS, np.ones_like(IDS))
        state, rates = initial_state(parameters, AdamW()), Rates(np.float32(1e-3))
        return train_step(network, StepSettings(AdamW(), indexer="sparse"), state, batch, rates)

    return forward, generated, trained


EVERY = ("forward", "generated", "trained")


@pytest.mark.parametrize(
    ("dtype", "numerics", "cache", "kernels", "which"),
    [
        ("float32", "reference", "plain", "xla", EVERY),
        ("bfloat16", "qat", "fp8+mxfp4", "xla", EVERY),
        ("bfloat16", "reference", "fp8+fp8", "xla", ["generated"]),
        ("float32", "reference", "plain", "pallas-interpret", EVERY),
        ("bfloat16", "reference", "fp8+mxfp4", "pallas-interpret", ["generated"]),
    ],
)
def test_no_value_of_a_program_is_64_bits_wide(dtype, numerics, cache, kernels, which):
    """What a format of the cache changes, rounding included, `generated` has."""
    config = SMALL if kernels == "xla" and numerics != "qat" else KERNEL_CONFIG
    network = Network(config, Policy.of(dtype, numerics, cache=cache, kernels=kernels))
    wanted = [program for program in programs(network) if program.__name__ in which]
    assert len(wanted) == len(which)
    with jax.enable_x64(True):
        for program in wanted:
            assert wide_values(jax.make_jaxpr(program)(network.shapes()).jaxpr) == [], program.__name__


def test_no_value_of_drafting_is_64_bits_wide():
    head = DSpark(5, SMALL.vocab_size - 1, (0, 2), 3)
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=0, dspark=head)
    network = Network(config, Policy.of("bfloat16", cache="fp8+mxfp4"))
    (program,) = programs(network)
    with jax.enable_x64(True):
        assert wide_values(jax.make_jaxpr(program)(network.shapes()).jaxpr) == []


def test_scores_in_pieces_hold_no_64_bit_value(monkeypatch):
    """A loop over pieces counts in int32; contexts as short as those above are scored at once."""
    monkeypatch.setattr(indexer_xla, "MAX_SCORE_ELEMENTS", 1)  # 64 keys at once

    def scores(q, weights, stack, repeat):
        return indexer_xla.index_scores_xla(q, weights, Entries(stack, repeat), 100)

    shapes = ((1, 2, 2, 8), (1, 2, 2), (1, 1, 100, 8))
    operands = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    with jax.enable_x64(True):
        program = jax.make_jaxpr(scores)(*operands, jax.ShapeDtypeStruct((), np.int32)).jaxpr
    assert "scan[" in str(program) and wide_values(program) == []


def test_a_64_bit_value_is_found():
    with jax.enable_x64(True):
        program = jax.make_jaxpr(jax.jit(lambda x: x.argmax()))(np.zeros(3, np.float32))
    assert wide_values(program.jaxpr)


ONE_LAYER = dataclasses.replace(
    SMALL, attention_kinds=("csa",), router_kinds=("learned",), num_nextn_predict_layers=0
)
"""With a ring, a compressor and an indexer; what else a model has is in the programs traced above."""


def results() -> list[np.ndarray]:
    """Logits, tokens (greedy and drawn), and a training step."""
    parameters = telling_parameters(ONE_LAYER)
    model = LanguageModel(ONE_LAYER, Policy.of("float32"), parameters)
    network = Network(ONE_LAYER, model.policy)
    trained = programs(network)[2](jax.tree.map(jax.numpy.asarray, parameters))
    tokens = [model.generate(IDS, 3, temperature=heat, top_p=0.9, seed=4) for heat in (0.0, 1.0)]
    return [np.asarray(x) for x in (model.logits(IDS), *tokens, *jax.tree.leaves(trained))]


def test_the_numbers_of_x64_are_those_of_x32():
    with jax.enable_x64(False):
        narrow = results()
    with jax.enable_x64(True):
        wide = results()
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
