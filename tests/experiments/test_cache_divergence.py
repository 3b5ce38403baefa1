"""The comparison itself on numbers worked out by hand, and the whole study on an untrained model."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.training.recipe import QUICKSTART
from dsv4_jax.training.tokenizer import train_tokenizer
from experiments import cache_divergence


def test_compared():
    p = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    q = jnp.log(jnp.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    kl, same, nll = cache_divergence.compared(p, q, jnp.array([2, 0]))
    np.testing.assert_allclose(kl, [0.25 * math.log(2), 0], atol=1e-6)
    np.testing.assert_array_equal(same, [False, True])
    np.testing.assert_allclose(nll, [math.log(4), math.log(10)], rtol=1e-6)


class Fixed:
    """A stand-in whose distribution at a position depends on the position and on a shift of its own."""

    def __init__(self, shift):
        self.shift = shift

    def new_cache(self, rows, length):
        return 0

    def extend(self, cache, tokens):
        rows, count = tokens.shape
        position = cache + jnp.arange(count)
        logits = jnp.zeros((rows, count, 5)).at[:, jnp.arange(count), position % 5].set(1 + self.shift)
        return logits, cache + count


def test_measure_leaves_out_the_last_token_and_minds_the_chunks():
    tokens = np.arange(14).reshape(2, 7) % 5
    same = cache_divergence.measure(Fixed(0), Fixed(0), tokens, chunk=3)
    assert same["tokens"] == 12 and same["kl_max"] == 0 and same["agreement"] == 1
    other = cache_divergence.measure(Fixed(0), Fixed(1), tokens, chunk=3)
    assert other["kl_mean"] == pytest.approx(other["kl_max"]) and other["kl_max"] > 0
    total = math.log(4 + math.e)
    # Position t has its mass on t % 5; row 0 is followed by t + 1 (a miss), row 1 by t + 3 (a miss).
    assert same["loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.slow
def test_the_study_runs(tmp_path, monkeypatch):
    model = LanguageModel.random(QUICKSTART.config, QUICKSTART.policy)
    model.tokenizer = train_tokenizer(["def f(x):\n    return x\n"], QUICKSTART.config.vocab_size)
    model.save(tmp_path / "model")
    monkeypatch.setattr(cache_divergence, "VARIANTS", {"plain": {}, "fp8+mxfp4": {"cache": "fp8+mxfp4"}})
    out = tmp_path / "results" / "study.json"
    cache_divergence.main(cache_divergence.Options(tmp_path / "model", rows=1, length=40, chunk=32, out=out))
    plain, rounded = json.loads(out.read_text())["rows"]
    assert plain["kl_max"] == 0 and plain["agreement"] == 1 and plain["tokens"] == 39
    assert 0 < rounded["kl_mean"] < 0.01
    assert "| fp8+mxfp4 |" in out.with_suffix(".md").read_text()
