"""Byte totals and tensor counts of the releases, from shapes only."""

import tracemalloc

import pytest

from dsv4_jax.checkpoint import storage
from dsv4_jax.config import v4_flash, v4_pro
from tests.checkpoint.synthetic import small_config

FP8_BASE = storage.Release("fp8", "fp8", "mtp")


@pytest.mark.parametrize(
    ("config", "release", "num_tensors", "total"),
    [
        (v4_flash(), storage.PREVIEW, 69_187, 159_609_485_896),  # bytes published
        (v4_flash(), storage.FLASH_0731, 72_317, 166_878_536_440),  # both published
        (v4_pro(), storage.PREVIEW, 145_116, 864_704_792_696),  # derived
        (v4_pro(), storage.PRO_0813, 149_782, 892_727_580_904),  # both published
    ],
    ids=["flash", "flash-0731", "pro", "pro-0813"],
)
def test_totals_of_the_releases(config, release, num_tensors, total):
    tensors = list(storage.released_tensors(config, release))
    assert len({tensor.name for tensor in tensors}) == len(tensors) == num_tensors
    assert storage.total_bytes(tensors) == total


@pytest.mark.parametrize(
    ("config", "gigabytes"), [(v4_flash(), 292.5), (v4_pro(), 1602.0)], ids=["flash", "pro"]
)
def test_base_models_with_fp8_experts(config, gigabytes):
    total = storage.total_bytes(storage.released_tensors(config, FP8_BASE))
    assert abs(total / 1e9 - gigabytes) < 0.5


def test_nothing_is_allocated():
    tracemalloc.start()
    storage.total_bytes(storage.released_tensors(small_config(), storage.PREVIEW))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_flash_tensors_one_by_one():
    found = {t.name: (t.dtype, t.shape) for t in storage.released_tensors(v4_flash(), storage.PREVIEW)}
    for name, expected in {
        "embed.weight": ("BF16", (129280, 4096)),
        "layers.0.attn_norm.weight": ("BF16", (4096,)),
        "layers.0.hc_attn_fn": ("F32", (24, 16384)),
        "layers.0.attn.attn_sink": ("F32", (64,)),
        "layers.0.attn.wkv.weight": ("F8_E4M3", (512, 4096)),
        "layers.0.attn.wkv.scale": ("F8_E8M0", (4, 32)),
        "layers.0.attn.wo_a.scale": ("F8_E8M0", (64, 32)),
        "layers.0.ffn.gate.weight": ("BF16", (256, 4096)),
        "layers.0.ffn.gate.tid2eid": ("I64", (129280, 6)),
        "layers.4.ffn.gate.bias": ("F32", (256,)),
        "layers.0.ffn.shared_experts.w1.scale": ("F8_E8M0", (16, 32)),
        "layers.0.ffn.experts.0.w1.weight": ("I8", (2048, 2048)),
        "layers.0.ffn.experts.0.w1.scale": ("F8_E8M0", (2048, 128)),
        "layers.0.ffn.experts.0.w2.weight": ("I8", (4096, 1024)),
        "layers.0.ffn.experts.0.w2.scale": ("F8_E8M0", (4096, 64)),
        "layers.2.attn.compressor.wkv.weight": ("BF16", (1024, 4096)),
        "layers.2.attn.indexer.wq_b.scale": ("F8_E8M0", (64, 8)),
        "layers.2.attn.indexer.weights_proj.weight": ("BF16", (64, 4096)),
        "mtp.0.e_proj.scale": ("F8_E8M0", (32, 32)),
    }.items():
        assert found[name] == expected, name


def test_dspark_tensors():
    found = {t.name: (t.dtype, t.shape) for t in storage.released_tensors(v4_flash(), storage.FLASH_0731)}
    assert found["mtp.0.main_proj.weight"] == ("F8_E4M3", (4096, 12288))
    assert found["mtp.0.main_proj.scale"] == ("F8_E8M0", (32, 96))
    assert found["mtp.2.markov_head.markov_w2.weight"] == ("BF16", (129280, 256))
    assert found["mtp.2.confidence_head.proj.weight"] == ("BF16", (1, 4352))
    assert found["mtp.2.hc_head_fn"] == ("F32", (4, 16384))
    assert "mtp.1.ffn.experts.255.w2.scale" in found
    for absent in ("mtp.0.e_proj.weight", "mtp.0.norm.weight", "mtp.1.hc_head_fn", "mtp.3.norm"):
        assert absent not in found


def test_partial_blocks_round_up():
    tensors = list(storage.quantized("w.weight", "w.scale", (129, 300), "fp8"))
    assert [(t.dtype, t.shape) for t in tensors] == [("F8_E4M3", (129, 300)), ("F8_E8M0", (2, 3))]
