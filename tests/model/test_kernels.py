"""The model through interpreted Pallas kernels is the model on XLA: values, gradients, training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.model.operations import Operations, operations
from dsv4_jax.numerics import cache_storage
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, forward_losses, initial_state, train_step
from pallas_kernels import hybrid_attention
from pallas_kernels.formats.entry_rows import Fp8Rows
from pallas_kernels.hybrid_attention import tuning as attention_tuning
from pallas_kernels.hyper_connection.tuning import HyperConnectionBlocks
from tests.kernels.checks import assert_close
from tests.model.telling_weights import telling_model
from tests.models import all_kinds

# Widths that the kernels accept; few iterations of Sinkhorn, which references spell out.
WIDTHS = dict(hidden_size=128, head_dim=128, qk_rope_head_dim=64, index_head_dim=128, index_n_heads=4)
CONFIG = all_kinds(**WIDTHS, hc_sinkhorn_iters=4)
XLA, KERNELS = Policy.of("float32"), Policy.of("float32", kernels="pallas-interpret")
SMALL_BLOCKS = operations(KERNELS, HyperConnectionBlocks(16, 128))
"""A block is straight-line code in the interpreter's program: small ones compile five times faster."""
NETWORKS = {XLA: Network(CONFIG, XLA), KERNELS: Network(CONFIG, KERNELS, SMALL_BLOCKS)}
LENGTH = 44
TOLERANCE = 1e-5
"""The same float32 sums in another order, relative to the largest value."""


GATHER_FROM = 7
"""Visible entries from which on CSA gathers here: calls with a cache go both ways."""


@pytest.fixture(scope="module", autouse=True)
def early_gathering():
    """Calls with a cache gather early."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tuning, "gather_from", lambda **_: GATHER_FROM)
        yield


def computed_by(model: LanguageModel, chosen: Operations) -> LanguageModel:
    """The model with these operations."""
    model.network = model.network._replace(operations=chosen)
    return model


def plain_hyper_connections(policy: Policy) -> Operations:
    """Hyper-connections by their references: two thirds of a program, and nothing to do with a cache."""
    chosen = operations(policy)
    plain = {
        name: dataclasses.replace(getattr(chosen, name), settings=(("impl", "reference"),), kernels=())
        for name in ("enter", "leave", "advance", "collapse")
    }
    return dataclasses.replace(chosen, **plain)


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    """The same parameters on XLA and on kernels."""
    xla = telling_model(CONFIG)
    return xla, computed_by(LanguageModel(CONFIG, KERNELS, xla.parameters), SMALL_BLOCKS)


def tokens_of(seed: int, batch: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length), dtype=np.int32)


SEGMENTS = np.stack([np.repeat([1, 2, 3], [21, 1, 22]), np.repeat([1, 2, 0], [9, 27, 8])]).astype(np.int32)


def test_no_other_choice_is_taken():
    assert not any(each.kernels for each in operations(XLA).each())
    without = {each.name for each in operations(KERNELS).each() if not each.kernels}
    assert without == {"attend_among", "embed", "keep", "line", "look_up", "score", "view"}
    with pytest.raises(Exception, match="kernels='cuda' must be one of xla, pallas, pallas-interpret"):
        Policy.of("float32", kernels="cuda")


def test_kernels_are_what_runs(models):
    """Counted in the traced program: a choice that quietly fell back to XLA would have no kernel calls."""
    tokens = tokens_of(0)
    calls = [str(jax.make_jaxpr(model.logits)(tokens)).count("pallas_call[") for model in models]
    assert calls[0] == 0
    # Each layer: pre, post_pre, post; attention; experts (gate and up, down). Compressors and selection of
    # HCA and CSA; the collapse.
    assert calls[1] == 3 * (4 + 2) + 1 + 2 + 1 + 1


def test_packed_sequences(models):
    xla, kernels = models
    tokens = tokens_of(1)
    got, want = (model.logits(tokens, segment_ids=SEGMENTS) for model in (kernels, xla))
    assert_close(got[SEGMENTS > 0], want[SEGMENTS > 0], TOLERANCE)


@pytest.mark.slow
def test_whole_sequences_and_mtp(models):
    xla, kernels = models
    tokens = tokens_of(1)
    assert_close(kernels.logits(tokens), xla.logits(tokens), TOLERANCE)
    assert_close(kernels.mtp_logits(tokens), xla.mtp_logits(tokens), TOLERANCE)


@pytest.mark.slow
def test_taps(models):
    tokens = tokens_of(2)
    names = ["streams", "selected", "attention_mixing", "expert_mixing", "experts"]
    for got, want in zip(*(model.taps(tokens, names) for model in models[::-1]), strict=True):
        assert got.keys() == want.keys()
        for name in got:
            assert_close(got[name], want[name], TOLERANCE)


def appended(model: LanguageModel, tokens: np.ndarray, plan) -> list[np.ndarray]:
    """The logits of each row's tokens, appended in pieces of plan[i][b] tokens."""
    cache = model.new_cache(2, LENGTH)
    done, parts = np.zeros(2, int), ([], [])
    for counts in plan:
        piece = np.zeros((2, max(counts)), np.int32)
        for b, count in enumerate(counts):
            piece[b, :count] = tokens[b, done[b] : done[b] + count]
        logits, cache = model.extend(cache, piece, np.array(counts))
        for b, count in enumerate(counts):
            parts[b].append(np.asarray(logits[b, :count]))
        done += counts
    return [np.concatenate(part) for part in parts]


# Two programs: pieces longer than a ring, which mask at first and gather later, and a few tokens over the
# cache where it lies, at each end of the list of entries.
FEW = ([2, 1], [1, 2])
PIECES = ([19, 11], *FEW, [19, 19], *FEW[:1])


EVERY_KIND = CONFIG.attention_kinds


@pytest.mark.parametrize(
    ("cache", "kinds", "in_rows"),
    [
        pytest.param("plain", EVERY_KIND, False, marks=pytest.mark.slow),
        ("fp8+mxfp4", ("csa",), True),  # a ring, entries and keys in it
        pytest.param("fp8+mxfp4", EVERY_KIND, False, marks=pytest.mark.slow),
        pytest.param("fp8+fp8", EVERY_KIND, True, marks=pytest.mark.slow),
    ],
)
def test_appending_in_pieces(monkeypatch, cache, kinds, in_rows):
    """In every format of a cache the kernels read what XLA attends to without one."""
    monkeypatch.setattr(cache_storage, "rows_pay", lambda **_: in_rows)
    config = dataclasses.replace(
        CONFIG, attention_kinds=kinds, router_kinds=CONFIG.router_kinds[: len(kinds)]
    )
    parameters, tokens = telling_model(config).parameters, tokens_of(3)
    xla, kernels = (
        LanguageModel(config, Policy.of("float32", kernels=k, cache=cache), parameters)
        for k in ("xla", "pallas-interpret")
    )
    computed_by(kernels, plain_hyper_connections(kernels.policy))
    made, gathered = [], hybrid_attention.csa_attention
    record = lambda *arguments, **how: made.append(1) or gathered(*arguments, **how)  # noqa: E731
    monkeypatch.setattr(hybrid_attention, "csa_attention", record)
    got, want = appended(kernels, tokens, PIECES), np.asarray(xla.logits(tokens))
    layers = [layer for unit in kernels.new_cache(2, LENGTH).layers for layer in unit]
    (csa,) = (layer for layer in layers if layer.indexer is not None)
    assert isinstance(csa.compressor.entries, Fp8Rows) == in_rows
    assert len(made) == 1  # traced once: by the CSA layer for pieces longer than a ring
    for b in range(2):
        difference, scale = np.abs(got[b] - want[b, : len(got[b])]), np.abs(want).max()
        if cache == "plain":
            assert difference.max() < 1e-5 * scale
        else:
            # A last bit can move a value across a rounding boundary of the grid: most agree, all are close.
            assert np.median(difference) < 1e-5 * scale
            assert difference.max() < 1e-2 * scale


@pytest.mark.slow
def test_appending_in_any_pieces_is_the_full_forward(models):
    xla, kernels = models
    tokens = tokens_of(3)
    want = np.asarray(xla.logits(tokens))
    got = appended(kernels, tokens, ([19, 11], [1, 0], [1, 1], [3, 2], [1, 1], [19, 19]))
    assert [len(row) for row in got] == [LENGTH, LENGTH - 10]
    for b in range(2):
        assert_close(got[b], want[b, : len(got[b])], TOLERANCE)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(network: Network, parameters, batch: Batch):
    def loss(parameters):
        return forward_losses(network.holding(parameters), batch)[0].total()

    return jax.value_and_grad(loss, allow_int=True)(parameters)


@pytest.mark.slow
def test_gradients_of_every_parameter(models):
    batch = Batch(tokens_of(4), SEGMENTS)
    parameters = models[0].parameters
    want, want_grads = loss_and_gradients(NETWORKS[XLA], parameters, batch)
    got, got_grads = loss_and_gradients(NETWORKS[KERNELS], parameters, batch)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    moved = 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got_grads), jax.tree.leaves(want_grads), strict=True
    ):
        if not jnp.issubdtype(b.dtype, jnp.floating):
            continue
        scale = float(np.abs(b).max())
        moved += scale > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(scale, 1e-8), err_msg=str(path))
    assert moved > 40


@pytest.mark.slow
def test_twenty_training_steps():
    """The losses of twenty steps over two packed batches agree within 1e-5 (relative)."""
    optimizer = AdamW()
    losses = {}
    for policy in (XLA, KERNELS):
        network = NETWORKS[policy]
        state = initial_state(initial_parameters(CONFIG, policy, 3), optimizer)
        seen, settings = [], StepSettings(optimizer)
        for step in range(20):
            batch = Batch(tokens_of(100 + step % 2), SEGMENTS)
            state, report = train_step(network, settings, state, batch, Rates(np.float32(1e-3)))
            seen.append(float(report.loss))
        losses[policy.kernels] = np.array(seen)
    want, got = losses["xla"], losses["pallas-interpret"]
    assert want[-1] < want[0] - 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5)
