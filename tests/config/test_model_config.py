"""Presets and the split of layers into scanned stacks."""

import dataclasses

import pytest

from dsv4_jax.config import layer_stacks, tiny, v4_flash, v4_pro


def shape_of(config):
    return [(stack.first_layer, len(stack.kinds), stack.repeats) for stack in layer_stacks(config)]


def test_flash_is_three_layers_and_twenty_pairs():
    assert shape_of(v4_flash()) == [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 2, 20)]
    assert layer_stacks(v4_flash())[-1].kinds == (("hca", "learned"), ("csa", "learned"))


def test_pro_is_three_layers_and_twenty_nine_pairs():
    assert shape_of(v4_pro()) == [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 2, 29)]


@pytest.mark.parametrize("config", [v4_flash(), v4_pro(), tiny(4), tiny(7), tiny(12, like="pro")])
def test_stacks_cover_every_layer_in_order(config):
    covered = [
        (stack.layer_index(block, repeat), stack.kinds[block])
        for stack in layer_stacks(config)
        for repeat in range(stack.repeats)
        for block in range(len(stack.kinds))
    ]
    kinds = zip(config.attention_kinds, config.router_kinds, strict=True)
    assert covered == list(enumerate(kinds))


def test_a_run_of_one_kind_is_scanned_too():
    config = dataclasses.replace(v4_flash(), attention_kinds=("csa",) * 9, router_kinds=("learned",) * 9)
    assert shape_of(config) == [(0, 1, 9)]


def test_layer_counts_of_the_released_models():
    flash, pro = v4_flash().attention_kinds, v4_pro().attention_kinds
    assert [flash.count(kind) for kind in ("window", "csa", "hca")] == [2, 21, 20]
    assert [pro.count(kind) for kind in ("window", "csa", "hca")] == [0, 30, 31]


def test_tiny_needs_room_for_every_kind():
    with pytest.raises(ValueError, match="num_layers=3"):
        tiny(3)
