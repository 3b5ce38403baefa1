"""Published and derived sizes of the released models, from shapes alone."""

import dataclasses
import io
import json
from fractions import Fraction

import pytest
from rich.console import Console

from dsv4_jax import config
from dsv4_jax.config import io as config_io
from dsv4_jax.inspection import costs, report

FLASH = costs.inspect_config(config.v4_flash(), dspark_markov_rank=256)
PRO = costs.inspect_config(config.v4_pro(), dspark_markov_rank=512)

PARAMETERS = {
    "attention": (4_599_123_136, 18_293_589_632),
    "compressors": (261_464_576, 670_128_640),
    "indexers": (225_730_176, 501_384_960),
    "moe": (278_152_620_032, 1_551_593_789_184),
    "hyper_connections": (33_884_439, 84_069_603),
    "norms": (356_352, 881_664),
    "embedding": (529_530_880, 926_679_040),
    "head": (529_530_880, 926_679_040),
    "total": (284_332_240_471, 1_572_997_201_763),
    "active": (13_270_101_591, 48_852_402_019),
    "active_with_embedding": (13_799_632_471, 49_779_081_059),
}


@pytest.mark.parametrize("part", PARAMETERS)
def test_parameters_by_part(part):
    assert (getattr(FLASH.parameters, part), getattr(PRO.parameters, part)) == PARAMETERS[part]


def test_mtp_block():
    assert (FLASH.mtp_total, FLASH.mtp_active) == (6_610_048_891, 318_592_891)
    assert (PRO.mtp_total, PRO.mtp_active) == (25_840_145_979, 869_357_115)
    assert FLASH.total_with_mtp == 290_942_289_362
    assert PRO.total_with_mtp == 1_598_837_347_742


def test_pieces_of_a_layer():
    assert FLASH.layer == costs.LayerCounts(106_956_352, 8_393_216, 4_260_352, 10_749_056, 25_165_824)
    assert PRO.layer == costs.LayerCounts(299_894_912, 14_684_672, 7_406_080, 16_712_832, 66_060_288)


def test_bytes_per_token():
    flash = [cost.bytes_per_token for cost in FLASH.caches]
    assert flash == [6880, Fraction("3850.25"), Fraction("3514.25")]
    pro = [cost.bytes_per_token for cost in PRO.caches]
    assert pro == [9848, Fraction("5511.4375"), Fraction("5031.4375")]
    assert [cost.at(128) for cost in FLASH.caches] == [880_640, 492_832, 449_824]
    assert [cost.at(128) for cost in PRO.caches] == [1_260_544, 705_464, 644_024]
    assert [round(cost.at(2**20) / 2**30, 2) for cost in PRO.caches] == [9.62, 5.38, 4.91]


def test_entry_formats():
    formats = costs.cache_formats(config.v4_flash())
    assert [(f.entry_bytes, f.index_key_bytes) for f in formats] == [
        (1024, 256),
        (584, 132),
        (584, 68),
    ]


def test_fixed_state():
    assert [cost.window_bytes for cost in FLASH.caches] == [5_636_096, 3_214_336, 3_214_336]
    assert [cost.window_bytes for cost in PRO.caches] == [7_995_392, 4_559_872, 4_559_872]
    assert FLASH.caches[1].mtp_window_bytes == PRO.caches[2].mtp_window_bytes == 74_752
    assert FLASH.state == costs.StateBytes(12_206_080, 430_080)
    assert PRO.state == costs.StateBytes(18_710_528, 614_400)


def test_native_weights_take_what_the_file_takes():
    for model in (FLASH, PRO):
        on_disk, in_memory = model.checkpoint_bytes, model.memory_bytes
        for name in in_memory:
            assert 0.99 < in_memory[name] / on_disk[name] < 1.001


def test_checkpoint_bytes():
    assert FLASH.checkpoint_bytes["FP4 experts, FP8 linears"] == 159_609_485_896
    assert PRO.checkpoint_bytes["FP4 experts, FP8 linears"] == 864_704_792_696
    with_dspark = "FP4 experts, FP8 linears, DSpark draft head"
    assert FLASH.checkpoint_bytes[with_dspark] == 166_878_536_440
    assert PRO.checkpoint_bytes[with_dspark] == 892_727_580_904


@pytest.mark.parametrize("preset", [config.v4_flash(), config.v4_pro(), config.tiny()])
def test_our_cache_grows_by_the_formula(preset):
    formula = costs.cache_cost(preset, costs.cache_formats(preset)[0])
    allocated = costs.allocated_cache(preset)
    assert allocated.bytes_per_token == formula.bytes_per_token
    # rings: at least the window and the compressor rows that may still be needed, and not much more
    state = costs.state_bytes(preset).full_buffers // 2  # bfloat16
    assert formula.window_bytes + state <= allocated.fixed_bytes * 1.01
    assert allocated.fixed_bytes <= 1.5 * (formula.window_bytes + state) + 1024
    twice = costs.allocated_cache(preset, "float32")
    assert twice.bytes_per_token == 2 * allocated.bytes_per_token


def test_awkward_model():
    model = config.tiny(
        4,
        attention_kinds=("hca", "window", "csa", "csa"),
        router_kinds=("learned", "hash", "learned", "hash"),
        csa_ratio=3,
        hca_ratio=7,
        max_position_embeddings=5,
        num_nextn_predict_layers=0,
        num_experts_per_tok=8,
    )
    found = costs.inspect_config(model)
    assert found.mtp_total == found.mtp_active == 0
    assert found.parameters.inactive_experts == 0
    assert found.total_with_mtp == found.parameters.total
    assert found.caches[0].bytes_per_token == Fraction(2 * (64 + 32), 3) + Fraction(64, 7)
    assert found.allocated.bytes_per_token == found.caches[0].bytes_per_token


def test_no_compressed_layers():
    found = costs.inspect_config(config.tiny(4, attention_kinds=("window",) * 4))
    assert found.parameters.indexers == found.layer.csa_compressor == found.layer.indexer == 0
    assert found.caches[0].bytes_per_token == found.allocated.bytes_per_token == 0
    assert found.layer.attention > 0


def test_one_more_expert_changes_only_what_it_should():
    small, large = config.tiny(), config.tiny(n_routed_experts=9)
    before, after = (costs.count_parameters(c) for c in (small, large))
    expert = 3 * small.hidden_size * small.moe_intermediate_size
    gates = 7 * small.hidden_size + 4  # and a bias in the four learned layers
    assert after.moe - before.moe == 7 * expert + gates
    assert after.inactive_experts - before.inactive_experts == 7 * expert
    assert dataclasses.replace(after, moe=0, inactive_experts=0) == dataclasses.replace(
        before, moe=0, inactive_experts=0
    )


def test_dspark_file_adds_the_draft_head():
    raw = config_io.official_config_dict(config.tiny())
    plain = costs.inspect_file(config_io.parse_config(raw))
    assert len(plain.checkpoint_bytes) == 2 and plain.mtp_total > 0
    tiny = config.tiny(num_nextn_predict_layers=0, dspark=config.DSpark(5, 0, (4, 5, 6), 4))
    dspark = costs.inspect_file(config_io.parse_config(config_io.official_config_dict(tiny)))
    assert len(dspark.checkpoint_bytes) == 3 and dspark.mtp_total == 0
    # By hand: three window layers, each without MTP's own parts, and the head's own.
    d, v, stack = tiny.hidden_size, tiny.vocab_size, 4 * tiny.hidden_size
    own = 3 * d * d + d + d + (4 * stack + 4 + 1) + 2 * v * 4 + d + 4
    block = plain.mtp_total - (2 * d * d + 3 * d + 4 * stack + 4 + 1)
    assert dspark.dspark_total == 3 * block + own
    assert dspark.total_with_mtp == dspark.parameters.total + dspark.dspark_total
    inactive = 3 * (plain.mtp_total - plain.mtp_active) + v * 4
    assert dspark.dspark_active == dspark.dspark_total - inactive
    console = Console(file=io.StringIO(), width=120)
    report.print_tables(dspark, console)
    shown = console.file.getvalue()
    assert f"{dspark.dspark_total:,}" in shown and "reads layers 4, 5, 6" in shown
    assert report.as_plain(dspark)["parameters"]["dspark_total"] == dspark.dspark_total


def test_report_shows_every_number():
    console = Console(file=io.StringIO(), width=120)
    report.print_tables(FLASH, console)
    shown = console.file.getvalue()
    for wanted in ("284,332,240,471", "13,270,101,591", "6,610,048,891", "3,514.25"):
        assert wanted in shown
    for wanted in (
        "159,609,485,896",
        "12,206,080",
        "2 window, 21 csa, 20 hca",
        "3 hash, 40 learned",
    ):
        assert wanted in shown
    plain = json.loads(json.dumps(report.as_plain(FLASH)))
    assert plain["parameters"]["total"] == 284_332_240_471
    assert plain["cache"][2]["bytes_per_token"] == 3514.25
    assert plain["allocated_cache"]["bytes_per_token"] == 6880
