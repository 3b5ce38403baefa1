"""The synthetic fill stands for a real prefill, and the bytes are those of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import v4_flash, v4_pro
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics import cache_formats
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from dsv4_jax.numerics.policy import Policy
from experiments import long_context, long_context_terms
from experiments.long_context import (
    bytes_by_formula,
    entries_of,
    filled,
    num_bytes,
    prefill_seconds,
    tiny_model,
)

LENGTH, CAPACITY = 389, 1024  # not a whole number of blocks: 97 CSA entries, 3 HCA entries


def empty(format, capacity=CAPACITY):
    model = LanguageModel.random(tiny_model(), Policy.of("float32", cache=format))
    return model, model.new_cache(1, capacity)


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_bytes_a_token(format):
    """Real arrays, filled, within one percent of the formula; here the formula is met exactly."""
    model, cache = empty(format)
    cache = filled(cache, model.config, format, CAPACITY)
    expected = bytes_by_formula(model.config, format)
    assert num_bytes(entries_of(cache)) / CAPACITY == pytest.approx(expected, rel=0.01)


def test_the_formula_gives_the_released_models_bytes():
    assert bytes_by_formula(v4_flash(), "fp8+mxfp4") == 3514.25
    assert bytes_by_formula(v4_flash(), "fp8+fp8") == 3850.25
    assert bytes_by_formula(v4_pro(), "fp8+mxfp4") == 5031.4375


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8+mxfp4", "plain"])
def test_a_filled_cache_looks_like_a_prefilled_one(format):
    model, cache = empty(format)
    synthetic = filled(empty(format)[1], model.config, format, LENGTH)
    tokens = np.random.default_rng(0).integers(2, 512, (1, LENGTH))
    _, real = model.extend(cache, jnp.asarray(tokens, jnp.int32))
    assert jax.tree.structure(synthetic) == jax.tree.structure(real)
    assert num_bytes(synthetic) == num_bytes(real)
    ours, theirs = jax.tree.leaves(synthetic), jax.tree.leaves(real)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
    np.testing.assert_array_equal(synthetic.length, real.length)
    np.testing.assert_array_equal(synthetic.written, real.written)
    for mine, other in zip(entries_of(synthetic), entries_of(real), strict=True):
        for rows in (mine, other):
            written = np.asarray(cache_formats.read(rows, jnp.float32)).any(axis=-1)[0, 0]
            ratio = 4 if len(written) == CAPACITY // 4 else 128
            assert written[: LENGTH // ratio].all() and not written[LENGTH // ratio :].any()
        # On the format's grid (storing what is read changes nothing), and of the same scale.
        values, other_values = (np.asarray(cache_formats.read(rows, jnp.float32)) for rows in (mine, other))
        rounded = (
            cache_formats.round_entries(values, format, 64)
            if values.shape[-1] == 512
            else cache_formats.round_keys(values, format)
        )
        np.testing.assert_array_equal(rounded, values)
        assert np.std(values) == pytest.approx(np.std(other_values), rel=0.2)
    # A step from either cache works the same way.
    for cache in (synthetic, real):
        logits, after = model.extend(cache, jnp.zeros((1, 1), jnp.int32))
        assert np.isfinite(logits).all() and int(after.length[0]) == LENGTH + 1


def test_what_cannot_be_filled_is_refused():
    model, cache = empty("plain")
    for length in (0, CAPACITY + 1):
        with pytest.raises(ValueError, match=f"length={length}, 1 rows"):
            filled(cache, model.config, "plain", length)


def test_bytes_of_the_growing_terms():
    read = long_context_terms.bytes_read(tiny_model(), 4096, key=68, entry=584)
    assert read == {"index scores": 1024 * 68, "top-k": 1024 * 4, "HCA attention": 32 * 584}
    # No more keys than top-k: all of them are chosen.
    assert long_context_terms.bytes_read(tiny_model(), 2048, key=68, entry=584)["top-k"] == 0


def test_prefill_seconds_follow_straight_lines():
    # 10 tokens a chunk: 10 chunks of 2 s up to 100, then 30 of 2 .. 4 s, 3 s in the mean.
    assert prefill_seconds({100: 2.0, 400: 4.0}, 10) == pytest.approx(20 + 90)


def explained(last: float) -> str:
    times = {"index scores": {"1": 1.0, "2": 3.0}, "HCA attention": {"1": 1.0, "2": 7.0}}
    read = {name: {"1": 2**20, "2": 2**21} for name in times}
    growth = {"format": "plain", "runs": 1, "milliseconds": times, "bytes": read}
    return long_context_terms.explained(growth, {"1": 5.0, "2": last})


def test_growth_is_explained_by_what_was_measured():
    shown = explained(15.0)
    assert "goes from 5.00 to 15.00 ms (+10.00 ms), that of these terms by +8.00 ms" in shown
    assert "largest is HCA attention (+6.00 ms)" in shown and "80% of the growth" in shown
    assert "too noisy to divide" in explained(4.0)


@pytest.mark.slow
def test_the_study_runs(tmp_path):
    out = tmp_path / "results" / "study.json"
    options = long_context.Options(
        capacity=1024, contexts=(256, 1024), formats=("fp8+mxfp4",), runs=1, by_kind=False, out=out
    )
    long_context.main(options)
    shown = out.with_suffix(".md").read_text()
    assert "| fp8+mxfp4 | 167.56 | 167.56 |" in shown and "1,024 tokens" in shown
    assert "| index scores |" in shown and "minutes of CPU time for all 1,024 tokens" in shown
