"""What layers report of their routing."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.model.layer_report import LayerReport, ModelReport, balance_loss, row_loads
from dsv4_jax.model.router import Routing

balance = jax.jit(balance_loss)


def plain_balance_loss(scores, experts, valid):
    """Loops as the formula is written."""
    scores, experts, valid = (np.asarray(x) for x in (scores, experts, valid))
    num_experts, top_k = scores.shape[-1], experts.shape[-1]
    losses = []
    for s, chosen, ok in zip(scores, experts, valid, strict=True):
        if not ok.any():
            continue
        s, chosen = s[ok], chosen[ok]
        f = np.array([(chosen == e).sum() for e in range(num_experts)]) * num_experts
        f = f / (top_k * len(s))
        p = (s / s.sum(-1, keepdims=True)).mean(0)
        losses.append((f * p).sum())
    return np.mean(losses) if losses else 0.0


def test_balance_loss_matches_the_formula_with_padding_and_an_empty_row():
    rng = np.random.default_rng(0)
    scores = jnp.array(rng.random((4, 9, 6)), jnp.float32)
    experts = jnp.array([[rng.permutation(6)[:2] for _ in range(9)] for _ in range(4)], jnp.int32)
    valid = jnp.array(rng.random((4, 9)) < 0.6).at[2].set(False)
    got = balance(scores, experts, valid)
    np.testing.assert_allclose(got, plain_balance_loss(scores, experts, valid), rtol=1e-6)
    assert balance(scores, experts, jnp.zeros_like(valid)) == 0
    loads = row_loads(experts, valid, 6)
    assert loads.shape == (4, 6)
    np.testing.assert_array_equal(loads.sum(1), 2 * valid.sum(1))


def test_balance_loss_is_one_when_uniform_and_its_gradient_pushes_the_busy_expert_down():
    experts = jnp.arange(8, dtype=jnp.int32).reshape(1, 8, 1) % 4
    scores = jnp.ones((1, 8, 4))
    valid = jnp.ones((1, 8), bool)
    np.testing.assert_allclose(balance(scores, experts, valid), 1.0, rtol=1e-6)
    busy = jnp.zeros((1, 8, 1), jnp.int32)
    gradient = jax.jit(jax.grad(balance_loss))
    grad = gradient(scores, busy, valid)
    assert (grad[..., 0] > 0).all() and (grad[..., 1:] < 0).all()
    assert balance(jnp.zeros_like(scores), experts, valid) == 0
    assert np.isfinite(gradient(jnp.zeros_like(scores), experts, valid)).all()


def test_a_hash_layer_reports_loads_and_no_balance():
    experts = jnp.array([[0, 1], [1, 2], [3, 1], [2, 0]], jnp.int32)
    routing = Routing(
        experts, jnp.ones((4, 2)), jnp.array(np.random.default_rng(0).random((4, 4)), jnp.float32)
    )
    counted = jnp.array([[True, True], [True, False]])
    reports = {is_learned: LayerReport.of(routing, counted, is_learned) for is_learned in (False, True)}
    for report in reports.values():
        np.testing.assert_array_equal(report.loads, [1, 3, 1, 1])
    assert reports[False].balance == 0 and reports[True].balance > 0


def test_balance_losses_add_up_in_the_order_of_the_layers():
    """1e8 + 1 - 1e8 depends on the order: a unit of two layers, twice, then the MTP block."""

    def stack(*balances):
        return LayerReport(jnp.zeros((len(balances), 3)), *[jnp.array(balances, jnp.float32)] * 3)

    report = ModelReport(((stack(1.0),), (stack(1e8, 3.0), stack(-1e8, 4.0))), (stack(0.5),))
    assert report.balance() == 7.5
