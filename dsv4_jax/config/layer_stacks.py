"""The layer plan as runs of a repeating unit, over which the transformer scans."""

import dataclasses
import functools

from dsv4_jax.config.kinds import AttentionKind, RouterKind
from dsv4_jax.config.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """`repeats` copies of a unit of consecutive layers; parameters carry a leading axis of that size."""

    first_layer: int
    kinds: tuple[tuple[AttentionKind, RouterKind], ...]  # the unit: (attention, router) of each layer
    repeats: int

    def layer_index(self, block: int, repeat: int) -> int:
        """Layer number in the model of unit position `block` in copy `repeat`."""
        return self.first_layer + repeat * len(self.kinds) + block


MIN_SCANNED_REPEATS = 4
"""Shorter runs are plain layers: a scan slices (on a CPU: copies) each layer's weights out of the stack."""


@functools.lru_cache(maxsize=64)
def layer_stacks(config: ModelConfig) -> tuple[LayerStack, ...]:
    """Splits the layers into runs of a repeating unit, longest first from the left.

    Flash: two window layers, one CSA layer, 20 x (HCA, CSA). Pro: two HCA, one CSA, 29 x (HCA, CSA).
    """
    kinds = tuple(zip(config.attention_kinds, config.router_kinds, strict=True))
    stacks, start = [], 0
    while start < len(kinds):
        best = (1, 1)  # (unit length, repeats)
        for unit in range(1, (len(kinds) - start) // MIN_SCANNED_REPEATS + 1):
            repeats = 1
            while kinds[start + repeats * unit : start + (repeats + 1) * unit] == kinds[start : start + unit]:
                repeats += 1
            if repeats >= MIN_SCANNED_REPEATS and unit * repeats > best[0] * best[1]:
                best = (unit, repeats)
        unit, repeats = best
        stacks.append(LayerStack(start, kinds[start : start + unit], repeats))
        start += unit * repeats
    return tuple(stacks)
