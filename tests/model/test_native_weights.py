"""A model on quantised weights: the same numbers as on dequantised ones, without ever holding those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.checkpoint import storage
from dsv4_jax.config import tiny
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.operations import operations
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.block_matmul import block_matmul, products
from pallas_kernels.formats.weights import is_quantized, plain
from pallas_kernels.hyper_connection.tuning import HyperConnectionBlocks
from tests.checkpoint import synthetic
from tests.checkpoint.test_save import file_contents, stored_contents

# A scanned stack of four repeats, MTP. Every kind of layer: `test_logits_are_bit_equal...`.
CONFIG = synthetic.repeated_config(attention_kinds=("hca", "csa") * 4, router_kinds=("learned",) * 8)
STEP = dict(batch=2, max_length=64)  # of every cache here: programs of equal shapes are compiled once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, synthetic.write_checkpoint(directory, CONFIG, storage.PREVIEW)


def tokens_of(config, length, batch=2):
    return np.random.default_rng(3).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def both(directory, dtype):
    """The model on native and on dequantised weights."""
    return [dsv4_jax.load(directory, dtype=dtype, weights=weights) for weights in ("native", "dequantized")]


def test_steps_are_bit_equal_to_those_on_dequantised_weights(checkpoint):
    models = both(checkpoint[0], "bfloat16")
    assert len({model.num_params for model in models}) == 1
    tokens = tokens_of(CONFIG, 16)
    found = []
    for model in models:
        chunk, cache = model.extend(model.new_cache(**STEP), tokens)
        step, _ = model.extend(cache, tokens[:, :1])
        found.append((np.asarray(chunk), np.asarray(step)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.slow
@pytest.mark.parametrize(("release", "dtype"), [(storage.BASE, "float32"), (storage.PREVIEW, "bfloat16")])
def test_logits_are_bit_equal_to_those_on_dequantised_weights(tmp_path, release, dtype):
    config = synthetic.smallest_config()
    synthetic.write_checkpoint(tmp_path, config, release)
    native, full = both(tmp_path, dtype)
    tokens = tokens_of(config, 37)
    np.testing.assert_array_equal(native.mtp_logits(tokens), full.mtp_logits(tokens))
    np.testing.assert_array_equal(native.logits(tokens), full.logits(tokens))


def test_kernels_multiply_with_fp8_weights_as_they_are(tmp_path, monkeypatch):
    config = tiny(
        4,
        vocab_size=24,
        hidden_size=128,
        head_dim=128,
        index_head_dim=128,
        moe_intermediate_size=160,
        n_routed_experts=3,
        num_experts_per_tok=2,
        attention_kinds=("csa",),
        router_kinds=("learned",),
        sliding_window=8,
        index_topk=4,
        num_nextn_predict_layers=0,
    )
    synthetic.write_checkpoint(tmp_path, config, storage.BASE)
    calls = []
    monkeypatch.setattr(
        products, "block_matmul", lambda *a, **k: calls.append(a[1].shape) or block_matmul(*a, **k)
    )
    # A block of another family is straight-line code: a small one compiles five times faster.
    model = dsv4_jax.load(tmp_path, dtype="float32", kernels="pallas-interpret")
    small = operations(model.policy, HyperConnectionBlocks(16, 128))
    model.network = model.network._replace(operations=small)
    tokens = tokens_of(config, 24)
    got = np.asarray(model.logits(tokens))
    want = np.asarray(dsv4_jax.load(tmp_path, dtype="float32").logits(tokens))
    # wq_a, wq_b, wkv, wo_a, wo_b, three of the shared expert; the indexer's query.
    assert len(calls) == 8 + 1
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_saving_writes_the_bytes_that_were_read(checkpoint, tmp_path):
    directory, tensors = checkpoint
    dsv4_jax.load(directory).save(tmp_path / "again")
    assert file_contents(tmp_path / "again") == stored_contents(tensors)


@pytest.mark.parametrize("length", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_no_step_holds_a_dequantised_stack(checkpoint, length):
    """A decode step or a prefill chunk needs a layer's matrices and an expert's, not those of all repeats."""
    model = dsv4_jax.load(checkpoint[0])
    weights = [leaf for leaf in jax.tree.leaves(model.parameters, is_leaf=is_quantized) if is_quantized(leaf)]
    full = sum(jax.eval_shape(lambda w: plain(w, "float32"), w).size for w in weights)
    native = temporaries(model, length)
    reference = LanguageModel(CONFIG, Policy.of("bfloat16"), dequantized(model.parameters))
    # Beyond what the model needs anyway: less than a bit a weight.
    assert native - temporaries(reference, length) < full // 8


def dequantized(parameters):
    return jax.tree.map(lambda leaf: plain(leaf, "bfloat16") if is_quantized(leaf) else leaf, parameters,
                        is_leaf=is_quantized)  # fmt: skip


def temporaries(model, length):
    from dsv4_jax.inference import steps

    cache = model.new_cache(**STEP)
    tokens = jnp.asarray(tokens_of(CONFIG, length))
    counts = jnp.full(STEP["batch"], length, jnp.int32)
    lowered = steps.extend.lower(model.network, model.parameters, cache, tokens, counts)
    return lowered.compile().memory_analysis().temp_size_in_bytes
