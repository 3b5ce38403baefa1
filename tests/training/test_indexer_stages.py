"""The stages of sparse attention: what each one moves, and that the two losses do not reach each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.model.training_mode import TrainingMode
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.batch_losses import forward_losses
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW, merge_params, split_trainable
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from dsv4_jax.training.trained_parts import moments_after, of_backbone, of_indexer, parted
from tests.models import compressed_kinds

ONE_LAYER = dict(
    vocab_size=64, attention_kinds=("csa",), router_kinds=("learned",), num_nextn_predict_layers=0
)
CONFIG = compressed_kinds(**ONE_LAYER, initializer_range=0.3)
NETWORK = Network(CONFIG, Policy.of("float32"))
OPTIMIZER = AdamW()
DENSE = TrainingMode(dense=True)


def drawn():
    return initial_parameters(CONFIG, NETWORK.policy, 5)


def batch(seed=0):
    """Rows with two segments, one with padding: 12 entries at most, of which 3 are chosen."""
    segments = np.ones((3, 24), np.int32)
    segments[1, 9:] = 2
    segments[2, 21:] = 0
    return Batch(np.random.default_rng(seed).integers(2, 64, segments.shape).astype(np.int32), segments)


def equal(left, right):
    """Which parameters have the same bits in both trees, by path."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True)
    return {tuple(key.key for key in path): np.array_equal(a, b) for (path, a), b in pairs}


@functools.lru_cache(maxsize=4)
def step(indexer):
    """(the state before, that after, the report) of one step with this stage's settings."""
    settings = StepSettings(
        OPTIMIZER, attention="dense" if indexer == "warm-up" else "sparse", indexer=indexer
    )
    before = jax.device_get(initial_state(drawn(), OPTIMIZER))
    after, report = train_step(
        NETWORK, settings, initial_state(drawn(), OPTIMIZER), batch(), Rates(np.float32(1e-2))
    )
    return before, *jax.device_get((after, report))


def test_without_training_indexers_keep_every_bit():
    before, after, report = step("none")
    for path, same in equal(before.trained, after.trained).items():
        assert same == of_indexer(path), path
    assert not equal(before.fixed, after.fixed)["stacks", 0, "blocks", 0, "ffn", "gate", "bias"]
    assert report.indexer == report.indexer_grad_norm == 0 < report.grad_norm


def test_a_warm_up_moves_the_indexers_alone():
    before, after, report = step("warm-up")
    for path, same in equal(before.trained, after.trained).items():
        assert same == of_backbone(path), path
    assert all(equal(before.fixed, after.fixed).values())
    assert all(
        same == of_backbone(path)
        for moment in ("mu", "nu")
        for path, same in equal(getattr(before.moments[1], moment), getattr(after.moments[1], moment)).items()
    )
    assert report.grad_norm == 0 < report.indexer_grad_norm and report.indexer > 0
    assert np.isfinite(report.main) and int(after.step) == int(after.moments[1].count) == 1


def test_sparse_steps_move_everything_and_each_part_as_if_it_were_alone():
    _, alone, _ = step("none")
    _, after, report = step("sparse")
    backbone, indexers = parted(after.trained, of_backbone)
    assert not any(equal(indexers, parted(step("none")[0].trained, of_indexer)[0]).values())
    # The gradients are clipped: an indexer's must not make the backbone's shorter.
    assert report.grad_norm > 1 and report.indexer_grad_norm > 1e-3
    for want, got in zip(
        jax.tree.leaves(parted(alone.trained, of_backbone)[0]), jax.tree.leaves(backbone), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-4)  # Adam's first step is a sign


@functools.partial(jax.jit, static_argnums=2)
def gradients_of(trained, fixed, mode):
    """Of the language model's loss, and of the indexers'."""

    def loss(trained, which):
        parts, _ = forward_losses(NETWORK.holding(merge_params(trained, fixed)), batch(), mode)
        return parts.indexer if which == "indexer" else parts.main + parts.mtp + parts.balance

    return jax.grad(loss)(trained, "language"), jax.grad(loss)(trained, "indexer")


@pytest.mark.parametrize(
    "mode", [TrainingMode(False, True), pytest.param(TrainingMode(True, True), marks=pytest.mark.slow)]
)
def test_no_loss_reaches_the_other_part(mode):
    language, indexer = gradients_of(*split_trainable(drawn()), mode)
    for gradients, reached in ((language, of_backbone), (indexer, of_indexer)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            assert bool(np.asarray(leaf).any()) == reached(tuple(key.key for key in path)), path


def logits(network, params, mode):
    model = network.holding(params)
    return jax.jit(lambda: model.logits(model.hidden(model(spans.packed(*batch()[:2]), mode=mode).streams)))()


def test_dense_attention_is_that_of_a_model_that_chooses_every_entry():
    everything = Network(compressed_kinds(**ONE_LAYER, index_topk=12), NETWORK.policy)
    few, dense, all_chosen = (
        np.asarray(logits(network, drawn(), mode))
        for network, mode in ((NETWORK, TrainingMode()), (NETWORK, DENSE), (everything, TrainingMode()))
    )
    np.testing.assert_allclose(dense, all_chosen, rtol=1e-6, atol=1e-6)
    assert np.abs(few - dense).max() > 1e-3


def test_a_cache_is_for_inference():
    model = NETWORK.holding(drawn())
    with pytest.raises(ValueError, match="a call with a cache is inference"):
        model(spans.from_start(jnp.zeros((1, 4), jnp.int32), jnp.full(1, 4)), cache=object(), mode=DENSE)


def test_a_warm_up_teaches_the_indexer_what_attention_looks_at():
    state, seen = initial_state(drawn(), OPTIMIZER), []
    settings = StepSettings(OPTIMIZER, attention="dense", indexer="warm-up")
    for number in range(40):
        state, report = train_step(NETWORK, settings, state, batch(number % 4), Rates(np.float32(1e-2)))
        seen.append(float(report.indexer))
    assert np.mean(seen[-4:]) < 0.6 * np.mean(seen[:4])


def test_moments_follow_their_parameters_wherever_they_are_kept():
    path = ("stacks", 0, "blocks", 0, "attn", "indexer", "wq_b")
    tree = {"muon": {"stacks": {0: {"blocks": {0: {"attn": {"indexer": {"wq_b": 0}, "wq_a": 0}}}}}}}
    before = (tree, {"count": 0}, [0])
    after = jax.tree.map(lambda _: 1, before)
    kept = moments_after(before, after, of_backbone)
    assert of_indexer(path)
    own = kept[0]["muon"]["stacks"][0]["blocks"][0]["attn"]
    assert own == {"indexer": {"wq_b": 0}, "wq_a": 1} and kept[1:] == ({"count": 1}, [1])
