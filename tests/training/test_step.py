"""One training step on a model with every layer kind: what it measures and what it changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, TrainState, initial_state, train_step, validation_loss
from tests.models import all_kinds

CONFIG = all_kinds(hidden_size=32, hca_ratio=8, initializer_range=0.2)
POLICY = Policy.of("float32")
OPTIMIZER = AdamW()
GATE = ("ffn", "gate")


def make_batch(padding_token=0):
    """Two rows of 37: segments of lengths 21, 1, 15 and 20, 10, then 7 of padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 61, (2, 37)).astype(np.int32)
    segments = np.stack([np.repeat([1, 2, 3], [21, 1, 15]), np.repeat([1, 2, 0], [20, 10, 7])])
    tokens[segments == 0] = padding_token
    return Batch(tokens, segments.astype(np.int32))


def fresh_state() -> TrainState:
    return initial_state(initial_parameters(CONFIG, POLICY, 3), OPTIMIZER)


def run(state, batch, learning_rate=1e-3):
    rates = Rates(np.float32(learning_rate))
    return train_step(Network(CONFIG, POLICY), StepSettings(OPTIMIZER), state, batch, rates)


def segments_of(batch):
    """The token ids of every segment on its own."""
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment]


def nll(logits, targets):
    logits = np.asarray(logits, np.float64)[: len(targets)]
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]


@pytest.fixture(scope="module")
def first_step():
    """(the batch, the parameters before, the state after, the report)."""
    batch = make_batch()
    before = jax.tree.map(np.array, initial_parameters(CONFIG, POLICY, 3))
    after, report = run(fresh_state(), batch)
    return batch, before, after, report


def test_losses_are_those_of_each_segment_alone(first_step):
    batch, before, _, report = first_step
    model = LanguageModel(CONFIG, POLICY, jax.tree.map(jnp.asarray, before))
    main, further = [], []
    for tokens in segments_of(batch):
        padded = np.zeros((1, 37), np.int32)
        padded[0, : len(tokens)] = tokens
        main.append(nll(np.asarray(model.logits(padded))[0], tokens[1:]))
        if len(tokens) > 2:
            further.append(nll(np.asarray(model.mtp_logits(padded))[0], tokens[2:]))
    np.testing.assert_allclose(report.main, np.concatenate(main).mean(), rtol=2e-5)
    np.testing.assert_allclose(report.mtp, np.concatenate(further).mean(), rtol=2e-5)
    total = report.main + 0.3 * report.mtp + 1e-4 * 3 * report.balance
    np.testing.assert_allclose(report.loss, total, rtol=1e-6)


def test_biases_follow_the_loads_and_hash_tables_stay(first_step):
    batch, before, after, _ = first_step
    model = LanguageModel(CONFIG, POLICY, jax.tree.map(jnp.asarray, before))
    taps = model.taps(batch.tokens, ["experts"], segment_ids=batch.segment_ids)
    new = after.params
    for layer in (1, 2):
        chosen = np.asarray(taps[layer]["experts"])[batch.segment_ids > 0]
        loads = np.bincount(chosen.reshape(-1), minlength=CONFIG.n_routed_experts)
        bias = new["stacks"][layer]["blocks"][0]["ffn"]["gate"]["bias"]
        expected = 0.001 * np.sign(loads.mean() - loads)
        assert np.unique(expected).size > 1
        np.testing.assert_allclose(bias, expected[None], rtol=1e-6)
    mtp_bias = np.asarray(new["mtp"][0]["block"]["ffn"]["gate"]["bias"])
    assert set(np.round(np.abs(mtp_bias).reshape(-1) / 0.001)) <= {0, 1} and mtp_bias.any()
    table = ("stacks", 0, "blocks", 0, *GATE, "tid2eid")
    old_table, new_table = before, new
    for key in table:
        old_table, new_table = old_table[key], new_table[key]
    np.testing.assert_array_equal(old_table, new_table)


def test_every_part_but_the_indexer_gets_a_gradient(first_step):
    _, before, after, _ = first_step
    moments, _ = jax.tree_util.tree_flatten_with_path(after.moments[1].mu)
    without = {"/".join(str(key.key) for key in path) for path, leaf in moments if not np.asarray(leaf).any()}
    # Choosing entries is not differentiable: the indexer has a loss of its own (report, section 2.3).
    assert without and all("/indexer/" in path for path in without)
    assert all(np.isfinite(leaf).all() for _, leaf in moments)


def test_padding_has_no_influence_on_the_step(first_step):
    _, _, after, report = first_step
    other, other_report = run(fresh_state(), make_batch(padding_token=59))
    for left, right in zip(
        jax.tree.leaves((after, report)), jax.tree.leaves((other, other_report)), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_steps_reduce_the_loss_and_repeat_bit_for_bit():
    batch = make_batch()

    def losses():
        state, seen = fresh_state(), []
        for _ in range(12):
            state, report = run(state, batch, 3e-3)
            seen.append(float(report.loss))
        return seen, state

    (first, state), (second, _) = losses(), losses()
    assert first == second
    assert first[-1] < 0.8 * first[0]
    assert int(state.step) == 12
    loss = validation_loss(Network(CONFIG, POLICY), state.params, [batch])
    np.testing.assert_allclose(loss, float(run(state, batch)[1].main), rtol=1e-5)
