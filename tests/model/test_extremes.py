"""Values at the edge: huge router logits, clamped SwiGLU, dominant sinks, degenerate top-k, spec vectors."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv4_jax.config import v4_flash
from dsv4_jax.model import rope
from dsv4_jax.model.initial import Network
from pallas_kernels.hyper_connection import xla
from tests.model.equivalence import BATCH, SMALL, WIDTH, full, random_rows
from tests.model.telling_weights import FLOAT32, telling_model, telling_parameters
from tests.parity import float64_equations

LENGTHS = (WIDTH, 22, 7)


def changed(parameters, edit):
    """A copy of the parameter tree in which `edit(path, leaf)` replaced what it returns."""

    def apply(path, leaf):
        new = edit([str(key.key) for key in path], leaf)
        return leaf if new is None else np.broadcast_to(new, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(apply, copy.deepcopy(parameters))


def difference_from_equations(model, rows):
    """Largest logit difference from the float64 equations, relative to the largest logit."""
    worst = 0.0
    for row, logits in zip(rows, full(model, rows, WIDTH), strict=True):
        assert np.isfinite(logits).all()
        want = float64_equations.forward(model.parameters, model.config, row).logits
        worst = max(worst, float(np.abs(logits - want).max() / np.abs(want).max()))
    return worst


# ---- specification vectors -------------------------------------------------------------------------------


def test_sinkhorn_vectors():
    """Section 5: uniform logits, and an asymmetric matrix that tells comb from its transpose."""
    flat = xla.sinkhorn(jnp.zeros((4, 4, 1, 3)), 20, 1e-6)
    np.testing.assert_allclose(flat, 0.24999975, atol=1e-7)
    logits = np.array([[2, 0.5, 1, 1.5], [2, 0, 0.5, 1], [1.5, 2, 0, 0.5], [1, 1.5, 2, 0]], np.float32)
    mix = xla.sinkhorn(jnp.asarray(logits)[:, :, None, None], 20, 1e-6)[..., 0, 0]
    want = [
        [0.290082, 0.103394, 0.204005, 0.402517],
        [0.402518, 0.087019, 0.171695, 0.338767],
        [0.204005, 0.537280, 0.087019, 0.171695],
        [0.103394, 0.272305, 0.537280, 0.087019],
    ]
    np.testing.assert_allclose(mix, want, atol=1.5e-6)
    np.testing.assert_allclose(mix.sum(0), 0.999999, atol=1e-6)


def test_yarn_table():
    """Section 7, the released configuration: plain on window layers, YaRN on compressed ones."""
    plain, yarn = rope.window_frequencies(v4_flash()), rope.compressed_frequencies(v4_flash())
    pairs = [1, 15, 16, 20, 24, 25, 31]
    np.testing.assert_allclose(
        plain[pairs],
        [7.4989420e-1, 1.3335215e-2, 1e-2, 3.1622779e-3, 1e-3, 7.4989419e-4, 1.3335215e-4],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        yarn[pairs],
        [6.8765604e-1, 3.6355385e-3, 2.2656249e-3, 2.9697778e-4, 1.9531253e-5, 5.3723124e-6, 5.6805294e-7],
        rtol=2e-6,
    )
    assert plain.dtype == yarn.dtype == np.float32 and len(yarn) == 32


# ---- top-k -----------------------------------------------------------------------------------------------


ONE_CSA_LAYER = dataclasses.replace(
    SMALL, attention_kinds=("csa",), router_kinds=("learned",), num_nextn_predict_layers=0
)


@pytest.mark.parametrize("top_k", [1, 1000])
def test_top_k_of_one_and_of_more_than_there_are(top_k):
    model = telling_model(dataclasses.replace(ONE_CSA_LAYER, index_topk=top_k))
    rows = random_rows(SMALL.vocab_size, LENGTHS, seed=20)
    assert difference_from_equations(model, rows) <= 1e-5


def test_all_zero_indexer_scores_select_the_first_entries():
    model = telling_model(ONE_CSA_LAYER)
    model.parameters = changed(
        model.parameters, lambda path, leaf: 0.0 if path[-1] == "weights_proj" else None
    )
    rows = random_rows(SMALL.vocab_size, LENGTHS, seed=21)
    assert difference_from_equations(model, rows) <= 1e-5
    (tap,) = model.taps(np.stack([rows[0]] * BATCH), ["selected"])
    visible = (np.arange(WIDTH) + 1) // SMALL.csa_ratio
    want = np.arange(tap["selected"].shape[-1]) < np.minimum(visible, SMALL.index_topk)[:, None]
    np.testing.assert_array_equal(tap["selected"][0], want)


# ---- router ----------------------------------------------------------------------------------------------

ROUTER_LOGITS = {
    "low": [-1e4] * 8,
    "zero": [0.0] * 8,
    "high": [1e4] * 8,
    "mixed": [-1e4, 0.0, 1e4, -1e4, 3.0, -1e4, 0.0, 1e4],
    "one above": [-1e4] * 7 + [0.0],
    "both ends": [-1e4, 1e4] * 4,
} | {f"all {x}": [float(x)] * 8 for x in (-60, -80, -86, -87, -88, -90, -92, -95, -100, -103, -104, -110)}


def test_extreme_router_logits_give_finite_weights_and_gradients():
    model = Network(SMALL, FLOAT32).holding(telling_parameters(SMALL))
    router = model.stacks[1].blocks[0].ffn.gate  # learned
    layer = jax.tree.map(lambda leaf: leaf[0], nnx.to_pure_dict(nnx.split(router)[1]))
    graph = nnx.split(router)[0]
    wanted = np.array(list(ROUTER_LOGITS.values()), np.float32)

    @jax.jit
    def route(logits):
        # Inputs are unit vectors and the gate holds the logits themselves.
        weight = jnp.zeros_like(layer["weight"]).at[:, 0].set(logits)
        x = jnp.zeros((1, SMALL.hidden_size)).at[0, 0].set(1.0)
        routing = nnx.merge(graph, layer | {"weight": weight})(x, jnp.zeros(1, jnp.int32))
        return routing.weights[0], routing.experts[0], routing.scores[0]

    def one(logits):
        cotangent = jnp.arange(1.0, SMALL.num_experts_per_tok + 1)
        gradient = jax.grad(lambda z: (route(z)[0] * cotangent).sum())(logits)
        by_scores = jax.grad(lambda z: route(z)[2].sum())(logits)
        return *route(logits), gradient, by_scores

    weights, experts, scores, gradient, by_scores = jax.vmap(one)(jnp.asarray(wanted))
    for values in (weights, scores, gradient, by_scores):
        for name, row in zip(ROUTER_LOGITS, np.asarray(values), strict=True):
            assert np.isfinite(row).all(), (name, row)
    bias = layer["bias"]
    with np.errstate(under="ignore"):
        exact = np.sqrt(np.logaddexp(0.0, wanted.astype(np.float64)))
    for row, (name, logits) in enumerate(ROUTER_LOGITS.items()):
        chosen = np.argsort(-(exact[row] + bias), kind="stable")[: SMALL.num_experts_per_tok]
        assert set(np.asarray(experts[row])) == set(chosen), name
        if max(logits) > -80:
            total = exact[row][experts[row]].sum()
            want = SMALL.routed_scaling_factor * exact[row][experts[row]] / total
            np.testing.assert_allclose(weights[row], want, rtol=1e-5, atol=1e-12, err_msg=name)
            np.testing.assert_allclose(
                gradient[row], exact_gradient(wanted[row], experts[row]), atol=1e-5, err_msg=name
            )


def exact_gradient(logits, experts):
    """Of sum_i (i + 1) w_i with respect to the logits, in float64."""
    logits = logits.astype(np.float64)
    scores = np.sqrt(np.logaddexp(0.0, logits))
    slope = np.zeros_like(scores)
    alive = scores > 0
    slope[alive] = 1 / (1 + np.exp(-logits[alive])) / (2 * scores[alive])
    chosen, cotangent = scores[experts], np.arange(1.0, len(experts) + 1)
    total = chosen.sum()
    by_chosen = SMALL.routed_scaling_factor * (cotangent / total - (cotangent @ chosen) / total**2)
    out = np.zeros_like(logits)
    out[experts] = by_chosen * slope[experts]
    return out


# ---- SwiGLU and sinks --------------------------------------------------------------------------------------


def test_swiglu_far_beyond_the_clamp():
    """Pre-activations of about 30 in routed and shared experts: most factors are clamped ones."""
    model = telling_model(SMALL)
    model.parameters = changed(
        model.parameters, lambda path, leaf: 4 * leaf if path[-1] == "gate_up" else None
    )
    rows = random_rows(SMALL.vocab_size, LENGTHS, seed=22)
    assert difference_from_equations(model, rows) <= 1e-5


@pytest.mark.parametrize("sink", [-50.0, 0.0, 50.0, "mixed"])
def test_sinks(sink):
    """A sink of 50 takes all the mass, one of -50 none; both meet in the same softmax when mixed."""
    value = np.array([[-50.0, 50.0], [0.0, -50.0]]) if sink == "mixed" else sink
    model = telling_model(SMALL)
    model.parameters = changed(
        model.parameters, lambda path, leaf: value if path[-1] == "attn_sink" else None
    )
    rows = random_rows(SMALL.vocab_size, LENGTHS, seed=23)
    assert difference_from_equations(model, rows) <= 1e-5
