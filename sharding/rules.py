"""Which dims are split over which mesh axes: one table for each use of a model.

A letter is a dim of the parameter table (`dsv4_jax.parameters`); for activations and caches B is rows, T the
tokens of a row. A name with a question mark is skipped where its devices do not divide the dim, or would part
a quantisation block; a name without one must fit, so that nobody loses memory without being told. In one
array an axis splits one dim, the first that asks for it. `path:letter` speaks of one parameter alone.

Bytes that a chip then holds and reads are counted by `sharding.report`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

Rules = Mapping[str, str | tuple[str, ...]]
"""Letter of a dim, or path:letter, -> the mesh axis, or axes, that it is split over."""

OPTIONAL = "?"


def rule_for(rules: Rules, path: str, letter: str) -> str | tuple[str, ...]:
    """The axes that a dim of one array asks for; none without a rule.

    Args:
        rules: a table.
        path: of the array, such as stacks/0/blocks/1/ffn/gate/bias; a rule of its own may name its end.
        letter: of the dim.
    """
    for key in rules:
        end, found, own = key.rpartition(":")
        if found and own == letter and (path == end or path.endswith(f"/{end}")):
            return rules[key]
    return rules.get(letter, ())


@dataclasses.dataclass(frozen=True)
class RuleTable:
    """How one use of a model lays out its arrays.

    Attributes:
        name: for people.
        parameters: rules for the dims of parameters.
        activations: rules for the dims of activations and caches; every axis in them counts as if it had a
            question mark, because batches have any size.
    """

    name: str
    parameters: Rules
    activations: Rules

    def __hash__(self) -> int:
        """Equal tables are one key of a compiled program."""
        return hash((self.name, frozenset(self.parameters.items()), frozenset(self.activations.items())))


def without_axis(rules: Rules, axis: str) -> Rules:
    """The same rules where nothing is split over one axis of the mesh."""
    return {
        key: tuple(each for each in axis_names(axes) if each.removesuffix(OPTIONAL) != axis)
        for key, axes in rules.items()
    }


def axis_names(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return (axes,) if isinstance(axes, str) else tuple(axes)


ROUTER_WHOLE = {"ffn/gate/weight:E": (), "ffn/gate/bias:E": (), "ffn/gate/tid2eid:V": ()}
"""Every token asks for the scores of all experts: the router's few megabytes are on every device."""

SMALL_WHOLE = {"attn/attn_sink:G": (), "attn/attn_sink:J": (), "attn/q_norm:Q": ()}
"""A few numbers, all of which every device of a decode step uses: gathering them would cost a message a
layer."""

_WITHOUT_D = {"attn/wq_b:Q": "fsdp?", "attn/indexer/wq_b:Q": "fsdp?", "attn/wo_a:O": "fsdp?"}
"""Matrices that have no D: whole over fsdp, masters, gradients and moments of those of V4-Flash would take 46
GiB of every device that trains with AdamW."""

_MODEL = ("expert?", "tensor?")
"""Dense weights are split over the devices that share the experts too, where they divide: copied whole they
would be the larger part of what a chip reads in a decode step."""

_WHOLE_SEQUENCES: Rules = MappingProxyType(
    {"B": ("data", "fsdp", "expert"), "T": "context", "G": "tensor", "V": "tensor"}
)
"""Activations of many tokens a row: heads stay where their weights are."""

TRAIN = RuleTable(
    "train",
    MappingProxyType(
        {
            "E": "expert",
            "G": "tensor",
            "Hi": "tensor?",
            "F": "tensor?",
            "V": "tensor?",
            "D": "fsdp?",
            **_WITHOUT_D,
            **ROUTER_WHOLE,
        }
    ),
    _WHOLE_SEQUENCES,
)
"""Parameters, gradients and moments are split over fsdp; a row's tokens over context."""

PREFILL = RuleTable(
    "prefill",
    MappingProxyType(
        {
            "E": "expert",
            "G": "tensor",
            "Hi": "tensor?",
            "F": _MODEL,
            "V": _MODEL,
            "D": "fsdp?",
            **ROUTER_WHOLE,
        }
    ),
    _WHOLE_SEQUENCES,
)
"""Long prompts: few rows of many tokens."""

DECODE = RuleTable(
    "decode",
    MappingProxyType(
        {
            "E": "expert",
            "G": _MODEL,
            "J": _MODEL,
            "O": _MODEL,
            "Hi": _MODEL,
            "Q": _MODEL,
            "F": _MODEL,
            "V": _MODEL,
            "D": "fsdp?",
            **ROUTER_WHOLE,
            **SMALL_WHOLE,
        }
    ),
    MappingProxyType(
        {
            "B": ("data", "fsdp", "expert", "context", "tensor"),
            "G": ("expert", "tensor"),
            "V": ("expert", "tensor"),
        }
    ),
)
"""One token a row at a time: rows and their caches over every device, heads over the same devices."""

TABLES: Mapping[str, RuleTable] = MappingProxyType({table.name: table for table in (TRAIN, PREFILL, DECODE)})
