"""The quantisation simulation: one layer at a time against an independent torch composition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dsv4_jax.config import ModelConfig, tiny
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics import qat
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.numerics.qat import SWITCHES
from dsv4_jax.training.data import Batch
from dsv4_jax.training.step import forward_losses
from tests.model.telling_weights import telling_parameters
from tests.parity import torch_qat
from tests.parity.float64_equations import layer_params

LENGTH = 45
LONG = 200  # enough entries for two index scores to lie within a bfloat16 rounding of each other
# Groups of 128, 64 and 32 channels, whole and broken; more entries than the indexer chooses.
SIZES = dict(
    hidden_size=160,
    head_dim=96,
    qk_rope_head_dim=16,
    q_lora_rank=144,
    moe_intermediate_size=136,
    index_head_dim=64,
    index_topk=4,
    sliding_window=8,
    hca_ratio=16,
)
MODELS = {
    "flash": tiny(
        5,
        attention_kinds=("window", "hca", "csa"),
        router_kinds=("hash", "learned", "learned"),
        **SIZES,
    ),
    "pro": tiny(
        4,
        like="pro",
        attention_kinds=("hca", "csa"),
        router_kinds=("hash", "hash"),
        routed_scaling_factor=2.5,
        **SIZES,
    ),
}
EVERYTHING = frozenset(SWITCHES)


def model_of(config: ModelConfig, switches) -> LanguageModel:
    policy = Policy.of("float32", "qat", switches=switches)
    return LanguageModel(config, policy, telling_parameters(config))


def two_layers(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config,
        attention_kinds=("csa", "hca"),
        router_kinds=("hash", "learned"),
        num_nextn_predict_layers=0,
    )


def one_layer(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config, attention_kinds=("csa",), router_kinds=("learned",), num_nextn_predict_layers=0
    )


def tokens_of(config: ModelConfig, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(7).integers(0, config.vocab_size, (1, length), dtype=np.int32)


def median_relative(got, want) -> float:
    return float(np.median(np.abs(got - want)) / np.median(np.abs(want)))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_equals_torch_with_real_rounding(name):
    """Teacher-forced: each layer starts from the same streams, so that differences do not pile up."""
    config = MODELS[name]
    model, official = model_of(config, EVERYTHING), torch_qat.Official(config, EVERYTHING)
    tokens = tokens_of(config)
    streams = np.asarray(model.streams(tokens))
    for index, kind in enumerate(config.attention_kinds):
        params = layer_params(model.parameters, config, index)
        want = official.layer(streams[index, 0], tokens[0], params, kind)
        got = np.asarray(model.layer(index, streams[index], tokens))[0]
        np.testing.assert_allclose(got, streams[index + 1, 0], atol=2e-3 * np.abs(got).max())
        assert median_relative(got, want) < 1e-3, (index, kind)


ONLY_IN_CSA = {"idx_hadamard_fp4", "idx_score_bf16"}  # an HCA layer has no indexer


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_alone_equals_torch(switch):
    config = two_layers(MODELS["flash"])
    on = frozenset({switch})
    model, official = model_of(config, on), torch_qat.Official(config, on)
    tokens = tokens_of(config)
    shape = (1, LENGTH, config.hc_mult, config.hidden_size)
    streams = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for index, kind in enumerate(config.attention_kinds):
        if kind == "hca" and switch in ONLY_IN_CSA:
            continue
        params = layer_params(model.parameters, config, index)
        want = official.layer(streams[0], tokens[0], params, kind)
        got = np.asarray(model.layer(index, streams, tokens))[0]
        assert median_relative(got, want) < 1e-4, (index, kind)


def test_each_switch_changes_the_output_and_none_is_the_reference():
    config = one_layer(MODELS["flash"])  # CSA has every switch
    tokens = tokens_of(config, LONG)
    parameters = telling_parameters(config)
    reference = LanguageModel(config, Policy.of("float32"), parameters).logits(tokens)
    np.testing.assert_array_equal(model_of(config, ()).logits(tokens), reference)
    seen = []
    for switch in SWITCHES:
        # In float32 the compressors' float32 is nothing new: bfloat16 shows that switch.
        dtype = "bfloat16" if switch == "compressor_fp32" else "float32"
        with_it = LanguageModel(config, Policy.of(dtype, "qat", switches={switch}), parameters).logits(tokens)
        without = LanguageModel(config, Policy.of(dtype), parameters).logits(tokens)
        seen.append(np.asarray(with_it))
        assert np.abs(seen[-1] - np.asarray(without)).max() > 1e-4, switch
    assert all(np.abs(a - b).max() > 1e-5 for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_is_decode(dtype):
    config = two_layers(MODELS["flash"])
    model = LanguageModel(config, Policy.of(dtype, "qat"), telling_parameters(config))
    tokens = tokens_of(config)
    want = np.asarray(model.logits(tokens))
    cache, got = model.new_cache(1, LENGTH), []
    for piece in np.split(tokens, [22, 23], axis=1):
        logits, cache = model.extend(cache, piece)
        got.append(np.asarray(logits))
    # A last bit can move a value across a rounding boundary of the grid: a bound on all, a tight one on most.
    difference = np.abs(np.concatenate(got, axis=1) - want)
    scale = np.abs(want).max()
    assert np.median(difference) < (1e-5 if dtype == "float32" else 2e-3) * scale
    assert difference.max() < 5e-2 * scale


def test_gradients_pass_straight_through(monkeypatch):
    """Against the other way to write it, x + stop_gradient(round(x) - x), in every place at once."""
    config = one_layer(MODELS["flash"])
    parameters = telling_parameters(config)
    tokens = np.concatenate([tokens_of(config)] * 2)
    batch = Batch(tokens, np.ones_like(tokens))
    network = Network(config, Policy.of("float32", "qat"))

    def grads():
        def loss(parameters):
            return forward_losses(network.holding(parameters), batch)[0].total()

        return jax.jit(jax.grad(loss, allow_int=True))(parameters)

    def by_stop_gradient(exact, x, *group):
        return x + jax.lax.stop_gradient(exact(x, *group) - x)

    got = grads()
    for name in ("fake_fp8", "fake_mxfp4", "to_bfloat16"):
        monkeypatch.setattr(qat, name, functools.partial(by_stop_gradient, getattr(qat, name)))
    want = grads()
    compared = 0
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        if not jnp.issubdtype(b.dtype, jnp.floating) or not np.asarray(b).any():
            continue
        # The sum may miss the grid by a last bit, which the next rounding may turn into a step of its own.
        a, b = np.asarray(a).ravel(), np.asarray(b).ravel()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999, path
        compared += 1
    assert compared > 20


def test_torch_primitives_agree_with_the_specification():
    vector = torch.tensor([0.3, -1.0, 5.1, 0.02, 7.0, -2.4, 0.9, 3.3])
    assert torch_qat.qdq4(vector).tolist() == [0, -1, 6, 0, 8, -2, 1, 3]
    assert torch_qat.qdq8(vector, 8).tolist() == [0.3125, -1, 5, 0.01953125, 7, -2.5, 0.875, 3.25]
