"""Entries and keys read out of long stacks: the values of whole ones, the work of the rows read."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.config import tiny
from dsv4_jax.inference import steps
from dsv4_jax.model.cache import new_cache, write_ring
from dsv4_jax.model.entries import Entries
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics import cache_formats, cache_storage
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from dsv4_jax.numerics.cache_storage import write_entries
from dsv4_jax.numerics.policy import Policy
from pallas_kernels import entry_write
from pallas_kernels.formats import bits, e2m1, e4m3, e8m0, entry_rows
from pallas_kernels.indexer import xla as indexer_xla
from tests.model.test_compile import abstract_decode

QUANTISED = CACHE_FORMATS[1:]


store_entries = jax.jit(cache_formats.store_entries, static_argnums=(1, 2))
store_keys = jax.jit(cache_formats.store_keys, static_argnums=1)
numbers_of = jax.jit(cache_formats.read, static_argnums=1)
as_bits_of = jax.jit(bits.bits)
written_ring = jax.jit(write_ring, static_argnames="choose_narrow")


def draw(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_every_byte_is_its_e4m3_number():
    codes = np.arange(256, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    got = np.asarray(jax.jit(e4m3.value)(codes))
    np.testing.assert_array_equal(got, want)  # NaN equals NaN
    np.testing.assert_array_equal(np.signbit(got[128:255]), np.ones(127, bool))  # also of -0


def test_halves_are_even_and_odd_numbers():
    packed = np.arange(256, dtype=np.uint8)
    both = e2m1.value(e2m1.unpack(packed))
    for got, want in zip(e2m1.halves(packed), (both[0::2], both[1::2]), strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32) * e2m1.OF_PLACED, want)


@pytest.mark.parametrize("cache_format", QUANTISED)
def test_bits_read_as_the_numbers(cache_format):
    stored = store_entries(draw(2, 3, 512), cache_format, 64)
    assert (stored.values.dtype, stored.rotary.dtype) == (jnp.float8_e4m3fn, jnp.bfloat16)
    as_bits = as_bits_of(stored)
    assert (as_bits.values.dtype, as_bits.rotary.dtype) == (jnp.uint8, jnp.uint16)
    scale = np.repeat(np.asarray(e8m0.value(stored.scales)), 64, axis=-1)[..., :448]
    for kept in (stored, as_bits):
        read = np.asarray(numbers_of(kept, jnp.float32))
        np.testing.assert_array_equal(read[..., :448], stored.values.astype(jnp.float32) * scale)
        np.testing.assert_array_equal(read[..., 448:], stored.rotary.astype(jnp.float32))


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_chosen_entries_are_those_of_the_prefix(cache_format):
    stack = as_bits_of(store_entries(draw(3, 2, 40, 96), cache_format, 16))
    entries = Entries(stack, jnp.int32(1))
    index = jnp.asarray([[0, 31, 7, 7], [30, 1, 0, 31]], jnp.int32)
    whole = np.asarray(entries.prefix(32, jnp.float32))
    got = np.asarray(entries.chosen(index, 32, jnp.float32))
    np.testing.assert_array_equal(got, whole[np.arange(2)[:, None], index])
    assert len(np.unique(got[0, :3], axis=0)) == 3


def test_the_prefix_of_rows_is_that_of_entries():
    stored = store_entries(draw(2, 40, 80), "fp8+fp8", 16)
    rows = entry_rows.empty(3, 2, 40, entry_rows.Layout(80, 16))
    every = jnp.zeros(2, jnp.int32), jnp.full(2, 40)
    rows = write_entries(rows, jnp.int32(1), stored, *every, columns=entry_write.write_entries)
    got = Entries(rows, jnp.int32(1)).prefix(31, jnp.float32)
    np.testing.assert_array_equal(got, numbers_of(stored, jnp.float32)[:, :31])
    assert Entries(rows, jnp.int32(1)).size == 40
    np.testing.assert_array_equal(Entries(rows, jnp.int32(0)).prefix(31, jnp.float32), 0)
    for read in (lambda e: e.piece(0, 2), lambda e: e.chosen(jnp.zeros((2, 1), jnp.int32), 40, jnp.float32)):
        with pytest.raises(TypeError, match="for kernels; make the cache with kernels='xla'"):
            read(Entries(rows, jnp.int32(1)))


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@pytest.mark.parametrize("size", [64, 65, 190, 200])
def test_scores_in_pieces(cache_format, size, monkeypatch):
    """A piece at a time, the last one moved back, gives the scores of all decoded keys at once."""
    q, weights = draw(2, 3, 5, 32), draw(2, 3, 5, seed=2)
    keys = Entries(store_keys(draw(2, 2, 200, 32, seed=3), cache_format), jnp.int32(1))
    monkeypatch.setattr(indexer_xla, "KEYS_AT_ONCE", 64)
    got = jax.jit(lambda q, weights, keys: indexer_xla.index_scores_xla(q, weights, keys, size))(
        q, weights, keys
    )
    read = np.asarray(keys.prefix(size, jnp.float32), np.float64)
    dots = np.maximum(np.einsum("bthd,bsd->bths", np.asarray(q, np.float64), read), 0)
    np.testing.assert_allclose(got, (dots * np.asarray(weights)[..., None]).sum(2), rtol=1e-5, atol=1e-5)


def test_bfloat16_numbers_as_bits():
    x = jnp.asarray([0.0, -0.0, 1e-40, 3.14, -2e38, jnp.inf, -jnp.inf], jnp.bfloat16)
    kept = as_bits_of(x)
    assert kept.dtype == jnp.uint16
    for dtype in (jnp.bfloat16, jnp.float32):
        read = numbers_of(kept, dtype)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read.astype(jnp.float32), x.astype(jnp.float32))
    rounded = bits.as_stored(jnp.float32(1 + 2**-8 + 2**-10), jnp.uint16)  # to nearest
    assert float(numbers_of(rounded, jnp.float32)) == 1 + 2**-7


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("float32", "fp8+fp8"), marks=pytest.mark.slow),
        ("float32", "fp8+mxfp4"),
        ("bfloat16", "plain"),
    ],
)
def long_decode(request):
    """A decode step over 2^16 tokens, compiled: its memory, its text, entries and width of the CSA layer."""
    dtype, cache_format = request.param
    config = tiny(
        4,
        attention_kinds=("csa", "hca"),
        router_kinds=("learned", "learned"),
        max_position_embeddings=2**16,
        head_dim=96,
        qk_rope_head_dim=16,
        index_head_dim=32,
        index_topk=8,
        csa_ratio=4,
        hca_ratio=128,
        num_nextn_predict_layers=0,
    )
    policy = Policy.of(dtype, cache=cache_format)
    network = Network(config, policy)
    _, *others = abstract_decode(config, batch=1)
    cache = jax.eval_shape(
        lambda: new_cache(config, 1, 2**16, policy.cache_dtype, format=policy.cache_format)
    )
    program = steps.decode.lower(network, network.shapes(), cache, *others).compile()
    return program.memory_analysis(), program.as_text(), 2**16 // 4, config.head_dim


def test_a_decode_step_never_holds_its_entries_as_numbers(long_decode):
    memory, _, num_entries, width = long_decode
    assert memory.temp_size_in_bytes < num_entries * width * 4 / 4


def test_no_stack_of_bits_becomes_numbers(long_decode):
    """Not even inside a loop that is fused with its update, which would need no memory."""
    _, text, num_entries, _ = long_decode
    # The stack is there under this shape.
    assert re.search(rf"\bu8\[1,1,{num_entries},80\]|\bu16\[1,1,{num_entries},96\]", text)
    shapes = re.findall(rf"\b((?:bf|f)\w+)\[1,1,{num_entries},(\d+)\]", text)
    assert {(dtype, width) for dtype, width in shapes if width != "1"} == set()  # width 1: float32 scales


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@pytest.mark.parametrize("num_new", [1, 3, cache_storage.MOST_CHOSEN + 1])
def test_choosing_writes_what_scattering_writes(num_new, cache_format):
    """Rings of every format, rows that wrap around, and some that are dropped."""
    stack = store_entries(draw(2, 3, 12, 80), cache_format, 16)
    new = store_entries(draw(3, num_new, 80, seed=1), cache_format, 16)
    start, count = jnp.array([0, 10, 23], jnp.int32), jnp.array([num_new, 1, 0], jnp.int32)
    for as_bits in (False, True):
        ring = as_bits_of(stack) if as_bits else stack
        written = [
            written_ring(ring, jnp.int32(1), new, start, count, choose_narrow=choose)
            for choose in (True, False)
        ]
        jax.tree.map(np.testing.assert_array_equal, *[as_bits_of(one) for one in written])
