"""LoRA on a model with every kind of layer, held plain, in FP8 and in FP4."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.checkpoint import storage
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference import steps
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import LORA, row_at
from dsv4_jax.training.data import Batch
from dsv4_jax.training.lora import (
    Lora,
    chosen,
    lora_parameters,
    lora_shapes,
    lora_state,
    merged,
    with_lora,
)
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, train_step
from pallas_kernels.formats.weights import is_quantized, plain
from tests.checkpoint import synthetic
from tests.models import compressed_kinds

CONFIG = compressed_kinds(vocab_size=24, n_routed_experts=3)
# Expert stacks, folded matrices, the embedding, and matrices without block scales.
LORA_OF_MANY = Lora(3, 6.0, ("*/experts/*", "*/attn/wo_a", "*/attn/wq_b", "embed", "*/compressor/wkv"))
POLICY = Policy.of("float32")
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """(folder, model) of an instruct release: experts in FP4, other linear layers in FP8."""
    folder = tmp_path_factory.mktemp("release")
    synthetic.write_checkpoint(folder, CONFIG, storage.PREVIEW)
    return folder, dsv4_jax.load(folder, dtype="float32")


def random_factors(network, seed=1):
    """The small matrices as after some training: `b` is not zero any more."""
    factors = lora_parameters(network.config, network.lora, seed)
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape).astype(np.float32)), factors)


def logits_of(network, params, tokens=TOKENS):
    span = spans.from_start(jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1], jnp.int32))
    return np.asarray(steps.logits(network, params, span))


def leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def test_merged_is_the_formula_for_every_member_of_a_stack(native):
    """Against numpy in float64, matrix by matrix; everything that was not chosen is left alone."""
    _, model = native
    network = with_lora(model.network, LORA_OF_MANY)
    factors = random_factors(network)
    result = merged(network, {**model.parameters, LORA: factors})
    assert LORA not in result
    targets = chosen(model.config, LORA_OF_MANY)
    leaves = jax.tree_util.tree_leaves_with_path(model.parameters, is_leaf=is_quantized)
    formats = set()
    for keys, weight in leaves:
        path = tuple(key.key for key in keys)
        after = leaf(result, path)
        if path not in targets:
            assert is_quantized(after) == is_quantized(weight)
            for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(weight), strict=True):
                np.testing.assert_array_equal(one, other)
            continue
        formats.add(weight.blocks.format if is_quantized(weight) else "plain")
        before = np.asarray(plain(weight, jnp.float32), np.float64)
        parameter, pair = targets[path], leaf(factors, path)
        matrix = before.reshape(*parameter.leading, *parameter.stored).copy()
        for index in np.ndindex(*parameter.leading):
            b, a = (np.asarray(pair[name][index], np.float64) for name in "ba")
            assert b.shape[1] == a.shape[0] == 3
            matrix[index] += 2.0 * (b @ a)  # alpha / rank
        assert after.dtype == np.float32 and after.shape == weight.shape
        np.testing.assert_allclose(after, matrix.reshape(before.shape), rtol=1e-6, atol=1e-6)
    assert formats == {"plain", "fp8", "mxfp4"}


def test_what_is_applied_in_a_step_is_what_is_merged(native):
    folder, model = native
    network = with_lora(model.network, LORA_OF_MANY)
    params = {**model.parameters, LORA: random_factors(network)}
    applied = logits_of(network, params)
    np.testing.assert_array_equal(applied, logits_of(model.network, merged(network, params)))
    assert np.abs(applied - logits_of(model.network, model.parameters)).max() > 0.01


def test_at_the_start_nothing_is_changed(native):
    _, model = native
    network = with_lora(model.network, LORA_OF_MANY)
    state = lora_state(network, model.parameters, 0, AdamW())
    # Bit for bit: what is added is zero, and FP8 and FP4 are exact in float32.
    np.testing.assert_array_equal(
        logits_of(network, state.params), logits_of(model.network, model.parameters)
    )


def test_training_moves_the_small_matrices_alone_over_a_quantised_base(native):
    """By the public step, which donates its state: the base goes in and comes out, bit for bit."""
    _, model = native
    network = with_lora(model.network, LORA_OF_MANY)
    optimizer = AdamW(weight_decay=0.0)
    before = jax.tree.map(np.array, model.parameters)
    state = lora_state(network, jax.tree.map(jnp.array, model.parameters), 0, optimizer)
    start = jax.tree.map(np.array, state.trained)
    batch = Batch(TOKENS, np.ones_like(TOKENS))
    rates = Rates(np.float32(0.02), bias_speed=np.float32(0))
    losses = []
    for number in range(6):
        state, report = train_step(network, StepSettings(optimizer), state, batch, rates)
        losses.append(float(report.main))
        if number == 0:
            first = jax.tree.map(np.array, state.trained)
    assert losses[-1] < losses[0] - 0.1
    for one, other in zip(jax.tree.leaves(state.fixed), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)
    matrices = set()
    for keys, moved in jax.tree_util.tree_leaves_with_path(first):
        path = tuple(key.key for key in keys)
        matrices.add(path[1:-1])
        # While `b` is zero, `a` has no gradient; an indexer has none by the losses of text.
        moves = path[-1] == "b" and "indexer" not in path
        assert np.any(moved != leaf(start, path)) == moves, path
    assert matrices == set(chosen(model.config, LORA_OF_MANY))


@pytest.mark.parametrize("release", [None, storage.PREVIEW])
def test_a_merged_model_is_saved_and_loaded_with_equal_numbers(native, tmp_path, release):
    folder, model = native
    network = with_lora(model.network, LORA_OF_MANY)
    params = merged(network, {**model.parameters, LORA: random_factors(network)})
    result = LanguageModel(model.config, model.policy, params, stored=model.stored)
    wanted = np.asarray(result.logits(TOKENS))
    if release is None:
        result.save(tmp_path / "merged")
        again = dsv4_jax.load(tmp_path / "merged", dtype="float32")
        np.testing.assert_array_equal(np.asarray(again.logits(TOKENS)), wanted)
        return
    from dsv4_jax.checkpoint.save import save_checkpoint

    save_checkpoint(tmp_path / "merged", model.config, params, release=release)
    again = dsv4_jax.load(tmp_path / "merged", dtype="float32")
    held = leaf(again.parameters, ("stacks", 0, "blocks", 0, "ffn", "experts", "down"))
    assert held.blocks.format == "mxfp4"
    assert np.isfinite(np.asarray(again.logits(TOKENS))).all()


def test_bfloat16_parameters_stay_bfloat16():
    config = CONFIG
    policy = Policy.of("bfloat16")
    network = with_lora(Network(config, policy), Lora(1, 1.0, ("*/attn/wq_a",)))
    base = initial_parameters(config, policy, 0)
    result = merged(network, {**base, LORA: random_factors(network)})
    path = ("stacks", 0, "blocks", 0, "attn", "wq_a")
    assert leaf(result, path).dtype == jnp.bfloat16
    assert np.any(np.asarray(leaf(result, path) != leaf(base, path)))


def test_shapes_are_those_of_what_is_drawn():
    drawn = lora_parameters(CONFIG, LORA_OF_MANY, 0)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), drawn) == lora_shapes(
        CONFIG, LORA_OF_MANY
    )


def test_what_is_drawn_depends_on_seed_and_path_alone():
    config = CONFIG
    few, many = (lora_parameters(config, Lora(2, 1.0, t), 5) for t in (("embed",), ("embed", "head")))
    np.testing.assert_array_equal(few["embed"]["a"], many["embed"]["a"])
    assert np.any(np.asarray(many["embed"]["a"]) != many["head"]["a"])
    assert np.any(
        np.asarray(lora_parameters(config, Lora(2, 1.0, ("embed",)), 6)["embed"]["a"] != few["embed"]["a"])
    )
    assert few["embed"]["a"].shape == (2, config.hidden_size) and few["embed"]["b"].shape == (24, 2)
    assert not np.any(few["embed"]["b"])
    assert abs(float(jnp.std(few["embed"]["a"])) * np.sqrt(config.hidden_size) - 1) < 0.2


def test_rows_of_the_table_know_the_small_matrices():
    path = ("stacks", 0, "blocks", 0, "attn", "wq_a")
    for name in "ab":
        assert row_at((LORA, *path, name)) == row_at(path)
    for wrong in ((LORA, *path), (LORA, *path, "c"), (*path, "a"), (LORA, "a")):
        with pytest.raises(KeyError):
            row_at(wrong)


def test_every_problem_of_the_settings_is_named():
    config = CONFIG
    wrong = Lora(0, float("nan"), ("*/attn/q_norm", "nothing"))
    with pytest.raises(ProblemsError) as error:
        chosen(config, wrong)
    assert len(error.value.problems) == 4
    assert "target 'nothing' matches no matrix" in error.value.problems[-1]
    for empty in ((), "embed"):
        with pytest.raises(ProblemsError, match="must be a tuple of at least one pattern"):
            with_lora(Network(config, POLICY), dataclasses.replace(wrong, targets=empty))
    everything = chosen(config, Lora(1, 1.0, ("*",)))
    assert {p.role for p in everything.values()} == {"matrix", "expert", "embedding", "head"}


def test_a_model_on_a_mesh_keeps_its_place():
    alone = LanguageModel.random(CONFIG, POLICY)
    spread = LanguageModel.random(CONFIG, POLICY, mesh="fsdp=2,tensor=2", rules="train")
    lora = Lora(2, 4.0, ("*/experts/*", "*/attn/wq_b", "head"))
    results = []
    for model in (alone, spread):
        network = with_lora(model.network, lora)
        state = lora_state(network, model.parameters, 0, AdamW())
        factors = random_factors(network)
        if model is spread:
            everywhere = state.trained[LORA]["head"]["a"].sharding
            assert everywhere.is_fully_replicated and len(everywhere.device_set) == 4
            factors = jax.device_put(factors, everywhere)
        results.append(merged(network, {**state.fixed, LORA: factors}))
    for one, other, before in zip(*map(jax.tree.leaves, [*results, spread.parameters]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        assert other.sharding.is_equivalent_to(before.sharding, other.ndim)
