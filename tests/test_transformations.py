"""Public methods under jit, scan and grad; caches that an earlier call consumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from tests.models import compressed_kinds

CONFIG = compressed_kinds()
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6) * 7
COUNTS = np.array([6, 4], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]], np.int32)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.random(CONFIG, Policy.of("float32"), seed=3)


def same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_whole_sequences_take_tracers():
    """All methods in one program: they share most of what is compiled."""
    config = compressed_kinds(attention_kinds=("csa",), router_kinds=("learned",))
    lm = LanguageModel.random(config, Policy.of("float32"), seed=3)

    def every(t, n, s):
        streams = lm.streams(t)
        return (
            lm.logits(t, n),
            lm.logits(t, segment_ids=s),
            lm.mtp_logits(t),
            lm.taps(t, ["experts"], n),
            lm.layer(0, streams[0], t),
            streams,
        )

    got = jax.jit(every)(TOKENS, COUNTS, SEGMENTS)
    same(got, every(TOKENS, COUNTS, SEGMENTS))
    same(got[4], got[5][1])


def test_what_is_known_of_a_tracer_is_checked(lm):
    for call, argument, message in [
        (lm.logits, jnp.zeros(3, jnp.int32), r"shape \(3,\) must be \[B, T\]"),
        (lm.logits, jnp.zeros((1, 3), jnp.float32), "dtype float32 must be integers"),
        (lambda n: lm.logits(TOKENS, n), jnp.zeros(2, jnp.float32), "num_valid of dtype float32"),
        (lambda n: lm.logits(TOKENS, n), jnp.zeros(3, jnp.int32), "num_valid"),
        (lambda s: lm.logits(TOKENS, segment_ids=s), jnp.zeros((2, 6)), "segment_ids of dtype"),
        (lambda k: lm.new_cache(1, 8).rewind(k), jnp.float32(1), "num_tokens of dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, argument)


def test_extend_in_a_scan_and_rewind_in_a_jit(lm):
    want, cache = lm.extend(lm.new_cache(2, 16), TOKENS)

    @jax.jit
    def run(tokens):
        def step(cache, column):
            logits, cache = lm.extend(cache, column[:, None])
            return cache, logits[:, 0]

        cache, logits = jax.lax.scan(step, lm.new_cache(2, 16), tokens.T)
        return logits.swapaxes(0, 1), cache.rewind(1), cache.rewind(tokens[:, 0] * 0 + 2)

    got, by_one, by_two = run(jnp.asarray(TOKENS))
    same(got, want)
    assert by_one.length.tolist() == [5, 5] and by_two.length.tolist() == [4, 4]
    after, _ = lm.extend(by_one, TOKENS[:, 5:])
    same(after[:, 0], want[:, 5])
    assert cache.length.tolist() == [6, 6]


def test_a_jitted_extend_does_not_consume_its_cache(lm):
    cache = lm.new_cache(1, 16)
    step = jax.jit(lambda cache, t: lm.extend(cache, t)[0])
    same(step(cache, TOKENS[:1]), step(cache, TOKENS[:1]))


@pytest.mark.parametrize(
    "call",
    [
        lambda lm, x: lm.generate(x[None], 2),
        lambda lm, x: lm.generate([[x[0]]], 2),
        lambda lm, x: lm.generate([[1]], 2, seed=x[0]),
        lambda lm, x: lm.generate([[1]], x[0]),
        lambda lm, x: lm.generate([[1]], 2, temperature=x[0].astype(float)),
        lambda lm, x: lm.new_cache(x[0], 8),
        lambda lm, x: lm.layer(x[0], np.zeros((1, 1, 4, 64)), [[1]]),
    ],
)
def test_what_cannot_be_traced_says_what_to_do(lm, call):
    with pytest.raises(TypeError, match=r"cannot be traced by jax.jit.*: (call it outside|give)") as refused:
        jax.eval_shape(lambda x: call(lm, x), jnp.arange(3))
    assert "\n" not in str(refused.value)


def test_generation_with_traced_parameters_is_refused(lm):
    def drawn(parameters):
        return LanguageModel(lm.config, lm.policy, parameters).generate([[1]], 2)

    with pytest.raises(TypeError, match="call it outside"):
        jax.eval_shape(drawn, lm.parameters)


# ---- consumed caches ----


def test_a_consumed_cache_says_so(lm):
    cache = lm.new_cache(2, 16)
    _, going = lm.extend(cache, TOKENS)
    rewound = going.rewind(1)
    lm.extend(going, TOKENS[:, :1])
    for dead in (cache, going, rewound):
        for call in (
            lambda c: lm.extend(c, TOKENS[:, :1]),
            lambda c: c.rewind(1),
        ):
            with pytest.raises(ValueError, match="this cache was consumed by an earlier call"):
                call(dead)


def test_what_is_no_cache(lm):
    with pytest.raises(ValueError, match="a cache comes from new_cache"):
        lm.extend(TOKENS, lm.new_cache(2, 16))


# ---- gradients ----


def test_gradients_of_the_trainable_parameters(lm):
    """Of a loss through the public API; a step against them lowers it, and nothing has no gradient."""
    trained, fixed = dsv4_jax.trainable(lm.parameters)
    tokens = jnp.asarray(TOKENS)

    def loss(trained):
        model = dsv4_jax.LanguageModel(lm.config, lm.policy, dsv4_jax.joined(trained, fixed))
        scores = jax.nn.log_softmax(model.logits(tokens)[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    assert jax.tree.structure(gradients) == jax.tree.structure(trained)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["head"]).max() > 0
    lower = loss(jax.tree.map(lambda p, g: p - 0.1 * g, trained, gradients))
    assert float(lower) < float(value)


def test_the_split_is_whole_and_leaves_integers_out(lm):
    trained, fixed = dsv4_jax.trainable(lm.parameters)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trained))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(fixed)} == {"int32", "float32"}
    whole = dsv4_jax.joined(trained, fixed)
    assert jax.tree.structure(whole) == jax.tree.structure(lm.parameters)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (whole, lm.parameters)), strict=True))


def test_weights_in_fp8_have_no_gradient(tmp_path):
    from dsv4_jax.checkpoint import storage
    from tests.checkpoint.synthetic import smallest_config, write_checkpoint

    config = smallest_config(attention_kinds=("csa",), router_kinds=("learned",))
    write_checkpoint(tmp_path / "model", config, storage.PREVIEW)
    with pytest.raises(ValueError, match="FP8 or FP4 have no gradient: load with weights='dequantized'"):
        dsv4_jax.trainable(dsv4_jax.load(tmp_path / "model").parameters)
