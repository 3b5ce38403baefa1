"""A model on eight devices is the model on one: logits, caches, tokens, MTP, every format and kernel.

Sums over experts and parts of a dim are added in another order, so numbers differ in the last bits of
float32; tokens of greedy generation do not.
"""

import jax
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.checkpoint import storage
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference import steps
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.operations import operations
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.hyper_connection.tuning import HyperConnectionBlocks
from tests.checkpoint import synthetic
from tests.kernels.checks import assert_close
from tests.models import all_kinds

# Two stacked repeats of a CSA and an HCA layer behind a window layer, and an MTP block.
CONFIG = all_kinds(
    vocab_size=64,
    attention_kinds=("window", *("csa", "hca") * 2),
    router_kinds=("hash", *("learned",) * 4),
    num_nextn_predict_layers=1,
    o_groups=4,
    num_attention_heads=8,
)
FLOAT32 = Policy.of("float32")
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 24)).astype(np.int32)
NUM_VALID = np.array([24, 1, 17, 0, 24, 9, 23, 16], np.int32)

BOUND = 1e-5
"""Of the largest number of an array."""

MESHES = ["expert=4,tensor=2", "data=2,fsdp=2,expert=2"]
OTHERS = [
    "data=1",
    "data=8",
    "fsdp=8",
    "expert=8",
    "tensor=2",
    "context=4",
    "data=2,context=2,expert=2",
    "fsdp=2,expert=2,tensor=2",
]
EVERY = [*MESHES, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in OTHERS)]


@pytest.fixture(scope="module")
def one():
    return LanguageModel.random(CONFIG, FLOAT32)


def run(lm, tokens, num_valid):
    """Logits of a chunk, of a step behind it, and the cache after both."""
    cache = lm.new_cache(len(tokens), 64, mtp=bool(lm.config.num_nextn_predict_layers))
    chunk, cache = lm.extend(cache, tokens, num_valid)
    step, cache = lm.extend(cache, tokens[:, :1])
    return chunk, step, cache


@pytest.fixture(scope="module")
def ran(one):
    return run(one, TOKENS, NUM_VALID)


@pytest.mark.parametrize("mesh", EVERY)
def test_chunks_steps_and_caches(one, ran, mesh):
    spread = LanguageModel.random(CONFIG, FLOAT32, mesh=mesh)
    chunk, step, cache = run(spread, TOKENS, NUM_VALID)
    for row, count in enumerate(NUM_VALID):
        if count:
            assert_close(chunk[row, :count], ran[0][row, :count], BOUND)
    assert_close(step, ran[1], BOUND)
    for got, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(ran[2]), strict=True):
        assert_close(got, wanted, BOUND)
    further = steps.draft(spread.network, spread.parameters, cache, TOKENS[:, 1])
    assert_close(further, steps.draft(one.network, one.parameters, ran[2], TOKENS[:, 1]), BOUND)


@pytest.mark.parametrize("mesh", EVERY)
def test_whole_sequences(one, mesh):
    spread = LanguageModel.random(CONFIG, FLOAT32, mesh=mesh)
    assert_close(spread.logits(TOKENS), one.logits(TOKENS), BOUND)
    if mesh not in MESHES:
        assert_close(spread.mtp_logits(TOKENS), one.mtp_logits(TOKENS), BOUND)


@pytest.mark.parametrize("rows", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_greedy_tokens_of_unequal_prompts(one, rows):
    """Three rows are fewer than the devices of an axis, and no multiple of any."""
    prompts = [TOKENS[row, : 5 + 2 * row].tolist() for row in range(rows)]
    spread = LanguageModel.random(CONFIG, FLOAT32, mesh="expert=8")
    np.testing.assert_array_equal(spread.generate(prompts, 6), one.generate(prompts, 6))


def test_a_step_is_compiled_once():
    spread = LanguageModel.random(CONFIG, FLOAT32, mesh="expert=8")
    list(spread.stream(TOKENS[:, :5], 3))
    before = steps.decode._cache_size()
    list(spread.stream(TOKENS[:, :5], 3))
    assert steps.decode._cache_size() == before


def test_caches_lie_over_all_devices():
    spread = LanguageModel.random(CONFIG, FLOAT32, mesh="expert=4,tensor=2")
    for cache in (spread.new_cache(8, 64), spread.extend(spread.new_cache(8, 64), TOKENS)[1]):
        for leaf in jax.tree.leaves(cache):
            assert leaf.sharding.shard_shape(leaf.shape)[min(leaf.ndim - 1, 1)] == 1
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """FP8 and FP4 weights; blocks of 128 leave room for two parts of the experts' width."""
    config = synthetic.smallest_config(n_routed_experts=4)
    directory = tmp_path_factory.mktemp("released")
    synthetic.write_checkpoint(directory, config, storage.PREVIEW)
    return directory


@pytest.mark.parametrize(
    ("mesh", "cache"),
    [
        ("data=2,expert=2,fsdp=2", "fp8+mxfp4"),
        pytest.param("expert=2,tensor=2,data=2", "fp8+fp8", marks=pytest.mark.slow),
        pytest.param("expert=2,tensor=2", "plain", marks=pytest.mark.slow),
    ],
)
def test_native_weights_and_caches(released, mesh, cache):
    one = dsv4_jax.load(released, dtype="float32", cache=cache)
    spread = dsv4_jax.load(released, dtype="float32", cache=cache, mesh=mesh)
    compare_steps(one, spread)


def compare_steps(one, spread):
    tokens = TOKENS % one.config.vocab_size
    for got, wanted in zip(run(spread, tokens, NUM_VALID)[:2], run(one, tokens, NUM_VALID)[:2], strict=True):
        got, wanted = (np.where(NUM_VALID[:, None, None] > 0, x, 0)[:, :1] for x in (got, wanted))
        assert_close(got, wanted, BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "cache"), [("expert=2,tensor=2", "plain"), ("data=2,expert=2", "plain")])
def test_kernels(tmp_path, mesh, cache):
    """Every device runs the kernels on its own rows and its own part of the FP8 weights.

    Each family has a quick test of its own, `tests/sharding/test_by_device.py` and `test_linear.py`. Not
    with a rounded cache: a sum that comes in another order may round the other way. On these meshes one does,
    and its row's logits differ by 1.6e-5 of the largest.
    """
    config = all_kinds(
        attention_kinds=("csa", "hca"),
        router_kinds=("hash", "learned"),
        hidden_size=128,
        head_dim=128,
        qk_rope_head_dim=64,
        index_head_dim=128,
        index_n_heads=4,
    )
    synthetic.write_checkpoint(tmp_path, config, storage.PREVIEW)
    how = {"dtype": "float32", "cache": cache, "kernels": "pallas-interpret"}
    models = [dsv4_jax.load(tmp_path, **how), dsv4_jax.load(tmp_path, **how, mesh=mesh)]
    for model in models:
        # A block of another family is straight-line code: a small one compiles five times faster.
        small = operations(model.policy, HyperConnectionBlocks(16, 128), model.placement)
        model.network = model.network._replace(operations=small)
    compare_steps(*models)


def test_what_is_refused(released):
    with pytest.raises(ProblemsError) as refused:
        LanguageModel.random(CONFIG, FLOAT32, mesh="expert=3,row=2", rules="fast")
    for each in ("there are no rules 'fast', only train, prefill, decode", "no axis 'row'"):
        assert each in str(refused.value)
    with pytest.raises(ProblemsError, match="E = 8 cannot be split 3 ways .mesh axis expert.; 2, 4"):
        LanguageModel.random(CONFIG, FLOAT32, mesh="expert=3")
    with pytest.raises(ProblemsError, match="expert=16 takes 16 devices, and there are 8"):
        dsv4_jax.load(released, mesh="expert=16")
    with pytest.raises(ProblemsError, match="rules are given, but no mesh"):
        dsv4_jax.load(released, rules="train")
