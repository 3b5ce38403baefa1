"""Quantised caches: what is stored is what was attended to; sizes in bytes; prefill is decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.errors import ConfigError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.cache import new_cache
from dsv4_jax.numerics import cache_formats, qat
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.columns import Columns
from pallas_kernels.formats.entries import Fp8Entries
from pallas_kernels.formats.entry_rows import Fp8Rows
from tests.model.telling_weights import telling_parameters
from tests.models import all_kinds

CONFIG = all_kinds(head_dim=96, qk_rope_head_dim=16, index_head_dim=32, num_nextn_predict_layers=0)
LENGTH = 44
QUANTISED = CACHE_FORMATS[1:]


def model_of(cache, dtype="float32"):
    return LanguageModel(CONFIG, Policy.of(dtype, cache=cache), telling_parameters(CONFIG))


def tokens_of(batch=2):
    return np.random.default_rng(5).integers(0, CONFIG.vocab_size, (batch, LENGTH), dtype=np.int32)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


round_entries = jax.jit(cache_formats.round_entries, static_argnums=(1, 2))
round_keys = jax.jit(cache_formats.round_keys, static_argnums=1)


@pytest.mark.parametrize(("width", "num_rotary"), [(512, 64), (96, 16), (23, 6)])
def test_entries_round_once(width, num_rotary):
    x = draw(3, 5, width)
    once = round_entries(x, "fp8+fp8", num_rotary)
    np.testing.assert_array_equal(round_entries(once, "fp8+fp8", num_rotary), once)
    still = width - num_rotary
    np.testing.assert_array_equal(
        once[..., :still], jax.jit(qat.fake_fp8, static_argnums=1)(x[..., :still], 64)
    )
    np.testing.assert_array_equal(once[..., still:], x[..., still:].astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("cache", QUANTISED)
@pytest.mark.parametrize("width", [128, 48, 8])
def test_keys_round_once(cache, width):
    x = draw(3, 5, width)
    once = round_keys(x, cache)
    assert np.abs(once - x).max() > 0
    np.testing.assert_array_equal(round_keys(once, cache), once)
    if cache == "fp8+mxfp4":
        np.testing.assert_array_equal(once, jax.jit(qat.fake_mxfp4)(x))


def test_bytes_of_v4_flash():
    """584-byte entries, 132- and 68-byte keys: the released figures, from the shapes of our cache."""
    config = v4_flash()
    expected = {"plain": 6880, "fp8+fp8": 3850.25, "fp8+mxfp4": 3514.25}
    for cache_format, per_token in expected.items():

        def num_bytes(max_length, cache_format=cache_format):
            dtype = jnp.dtype("bfloat16")
            make = lambda: new_cache(config, 1, max_length, dtype, format=cache_format)  # noqa: E731
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))

        assert (num_bytes(2**20) - num_bytes(2**19)) / 2**19 == per_token


def test_kernels_keep_many_chosen_entries_in_rows():
    """Beyond the context from which fetching them one by one pays; a thousandth more memory."""
    config, dtype = v4_flash(), jnp.dtype("bfloat16")

    def made(max_length, as_bits):
        make = functools.partial(new_cache, config, 1, max_length, dtype, format="fp8+mxfp4", as_bits=as_bits)
        return jax.eval_shape(make)

    def csa_entries(cache):
        return [layer.compressor.entries for unit in cache.layers for layer in unit if layer.indexer]

    def num_bytes(cache):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    def kinds(max_length, as_bits=False):
        return {type(entries) for entries in csa_entries(made(max_length, as_bits))}

    assert kinds(14_336) == {Columns}
    assert kinds(2**20, as_bits=True) == {Fp8Entries}
    assert kinds(14_400) == kinds(2**20) == {Fp8Rows}
    assert 1 < num_bytes(made(2**20, False)) / num_bytes(made(2**20, True)) < 1.002


@pytest.mark.parametrize(
    ("cache_format", "dtype"),
    [
        ("fp8+mxfp4", "float32"),
        pytest.param("fp8+fp8", "float32", marks=pytest.mark.slow),
        pytest.param("fp8+mxfp4", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_prefill_is_decode(cache_format, dtype):
    model = model_of(cache_format, dtype)
    tokens = tokens_of()
    want = np.asarray(model.logits(tokens))
    plain = np.asarray(model_of("plain", dtype).logits(tokens))
    assert np.abs(want - plain).max() > 1e-3  # the rounding is there without a cache too
    cache, got = model.new_cache(2, LENGTH), []
    for piece in np.split(tokens, [21, 22, 43], axis=1):
        logits, cache = model.extend(cache, piece)
        got.append(np.asarray(logits))
    # A last bit can move a value across a rounding boundary of the grid: a bound on all, a tight one on most.
    difference = np.abs(np.concatenate(got, axis=1) - want)
    scale = np.abs(want).max()
    assert np.median(difference) < (1e-5 if dtype == "float32" else 2e-3) * scale
    assert difference.max() < 5e-2 * scale


def test_rewinding_is_bit_exact():
    model = model_of("fp8+mxfp4")
    tokens = tokens_of()
    _, cache = model.extend(model.new_cache(2, LENGTH), tokens[:, :21])  # the pieces of the test above

    def three_more(cache):
        found = []
        for at in range(21, 24):
            logits, cache = model.extend(cache, tokens[:, at : at + 1])
            found.append(np.asarray(logits))
        return found, cache

    first, cache = three_more(cache)
    again, _ = three_more(cache.rewind(3))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(again[0], again[1])


def test_policy_says_what_does_not_go_together():
    for wrong, message in (
        (dict(cache="fp4"), "cache='fp4' must be one of plain"),
        (dict(cache="fp8+fp8", numerics="qat"), "leave one out"),
    ):
        with pytest.raises(ConfigError) as raised:
            Policy.of("float32", **wrong)
        assert message in str(raised.value)
