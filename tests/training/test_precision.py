"""Masters in float32 under bfloat16 products, and weights on the grid of FP8 while they are trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.numerics.qat import fake_fp8_weight
from dsv4_jax.parameters import WIDE_ROLES, parameters, row_at
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import Sgd
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from tests.models import compressed_kinds

CONFIG = compressed_kinds(vocab_size=64, num_nextn_predict_layers=0, initializer_range=0.2)
IDS = np.random.default_rng(0).integers(2, 64, (2, 20)).astype(np.int32)
MIXED = Policy.of("bfloat16", master="float32")
ISLANDS = ("gate/weight", "head")
"""What float32 products read as it is: with masters the product sees more digits than with bfloat16."""


def masters(policy=MIXED):
    """Drawn in float32; where products are float32, of numbers that bfloat16 has too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rounded(leaf) if name(path).endswith(ISLANDS) else leaf,
        initial_parameters(CONFIG, policy, 1),
    )


def name(path):
    return "/".join(str(key.key) for key in path)


def rounded(leaf):
    return leaf.astype(jnp.bfloat16).astype(leaf.dtype)


def in_bfloat16(path, leaf):
    wide = row_at(tuple(key.key for key in path)).role in WIDE_ROLES
    return leaf.astype(jnp.bfloat16) if wide else leaf


@functools.partial(jax.jit, static_argnums=0)
def streams(network, params):
    return network.holding(params)(spans.packed(IDS, jnp.ones_like(IDS))).streams


def test_masters_in_float32_give_the_bits_of_bfloat16_weights():
    wanted = streams(
        Network(CONFIG, Policy.of("bfloat16")), jax.tree_util.tree_map_with_path(in_bfloat16, masters())
    )
    np.testing.assert_array_equal(streams(Network(CONFIG, MIXED), masters()), wanted)


def test_steps_below_the_resolution_of_bfloat16_add_up_in_the_master():
    batch, rates = Batch(IDS, np.ones_like(IDS)), Rates(np.float32(1e-5))
    state, start = initial_state(masters(), Sgd()), jax.device_get(masters())
    for _ in range(3):
        state, report = train_step(Network(CONFIG, MIXED), StepSettings(Sgd()), state, batch, rates)
    assert np.isfinite(report.loss)
    after, before = (tree["stacks"][0]["blocks"][0]["attn"]["wkv"] for tree in (state.params, start))
    assert after.dtype == jnp.float32
    moved = np.asarray(after) != before
    assert moved.mean() > 0.9 and (np.abs(after - before) < np.abs(before) * 2.0**-9).mean() > 0.9


def test_weights_are_rounded_to_fp8_and_their_masters_trained():
    policy = Policy.of("float32", weights="fp8")
    params, table = initial_parameters(CONFIG, policy, 1), parameters(CONFIG)

    def by_hand(path, leaf):
        parameter = table[tuple(key.key for key in path)]
        if not parameter.row.quantized:
            return leaf
        matrices = leaf.reshape(*parameter.leading, -1, np.prod(parameter.own[parameter.matrix[0] :]))
        return fake_fp8_weight(matrices).reshape(leaf.shape)

    on_grid = jax.tree_util.tree_map_with_path(by_hand, params)
    network, plain = Network(CONFIG, policy), Network(CONFIG, Policy.of("float32"))
    got = streams(network, params)
    np.testing.assert_allclose(got, streams(plain, on_grid), rtol=1e-5, atol=1e-5)
    assert np.abs(got - streams(plain, params)).max() > 1e-2

    weights = jnp.asarray(np.random.default_rng(0).standard_normal((2, 130, 5)), jnp.float32)
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(fake_fp8_weight(w))))(weights)
    np.testing.assert_allclose(gradient, jnp.cos(fake_fp8_weight(weights)), rtol=1e-6)
