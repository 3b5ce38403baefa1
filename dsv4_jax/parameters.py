"""The table of parameters: what each one is, in one row. Everything else is a view of it.

The modules declare what the table says, checkpoints add names to it (`checkpoint.names`), initial values,
optimizer groups, the balance rule and the inspection ask for a row's role. Nothing else in the package
spells a parameter's shape or guesses its nature from its path.

Dims are letters of the legend in `config`, with three more: M = (2 + N) N rows of an mHC matrix (pre,
post, comb), `2` the gate and up projections, and `3` or `1` the parts of an mHC scale. In a row

    "E 2 | (G J Dh) Q"

the axes before the bar number matrices that a checkpoint stores apart, and parentheses fold neighbours into
one axis of the stored tensor. In a layer stack R, the repeats of its unit, comes first.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any, Literal

import numpy as np

from dsv4_jax.config import DSPARK_STAGES, AttentionKind, ModelConfig, RouterKind, layer_stacks

Path = tuple[str | int, ...]
"""Keys from the root of the parameter tree; list positions are ints."""

Parameters = dict[str | int, Any]
"""The parameter tree: nested dicts of arrays and quantised weights, the pure state of `Transformer`. List
positions are int keys, as in `nnx.to_pure_dict`."""

Role = Literal[
    "matrix",  # multiplies activations
    "expert",  # a routed expert's matrices
    "embedding",
    "head",
    "norm",  # RMSNorm weight
    "mixing",  # mHC matrix, from the flattened streams to the maps
    "mixing_bias",  # mHC base
    "mixing_gate",  # mHC scale, a gating factor for each part of the maps
    "sink",  # attention sink of each head
    "position_bias",  # of the compressor's softmax
    "selection_bias",  # of the router; moved by the balance rule, not by gradients
    "table",  # token id -> expert ids
]
Part = Literal[
    "attention", "compressors", "indexers", "moe", "hyper_connections", "norms", "embedding", "head", "draft"
]
"""Which count of `inspection.ParameterCounts` it belongs to; draft: only in an MTP block or a DSpark head."""

When = Literal["always", "compressed", "csa", "hash", "learned"]
"""Which layers have it; compressed: csa or hca."""

WIDE_ROLES: frozenset[Role] = frozenset({"matrix", "expert", "embedding", "head"})
"""Held in the policy's param dtype. The others are float32, tables int32."""

WITHOUT_GRADIENT: frozenset[Role] = frozenset({"selection_bias", "table"})
DECAYED: frozenset[Role] = WIDE_ROLES | {"mixing"}
"""What weight decay shrinks: matrices, embedding and head (report, section 2.4). Norms, biases and sinks are
left alone."""

INITIAL_VALUE: dict[Role, float] = {
    "norm": 1.0,
    "mixing_bias": 0.0,
    "mixing_gate": 0.01,  # mHC paper
    "sink": 0.0,
    "position_bias": 0.0,
    "selection_bias": 0.0,
}
"""Of parameters that start constant. Hash tables start balanced, the rest as normal(0, initializer_range)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `path` is relative to a layer, to the MTP block, or to the root.

    A parted row is stored as one matrix where the report's equations have several, along its first dim:
    branches of a compressor, output groups, the maps of mHC.
    """

    path: str
    dims: str
    role: Role
    part: Part
    when: When = "always"
    quantized: bool = False  # official releases store it with block scales
    parted: bool = False


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A row for one place in the tree of one model.

    Attributes:
        path: keys from the root.
        dims: one letter an axis.
        shape: sizes of those axes.
        num_leading: axes at the front that number the stored tensors: repeats, experts, gate and up.
        folds: how many of the other axes make each axis of a stored tensor.
        row: its line of the table.
    """

    path: Path
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    num_leading: int
    folds: tuple[int, ...]
    row: Row

    @property
    def role(self) -> Role:
        """What it is."""
        return self.row.role

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the axes that number stored tensors."""
        return self.shape[: self.num_leading]

    @property
    def own(self) -> tuple[int, ...]:
        """Sizes of the other axes."""
        return self.shape[self.num_leading :]

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of one stored tensor: `own` with neighbours folded."""
        return folded(self.own, self.folds)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """How many axes fold into O and into I of the matrix [O, I]; None: never quantised."""
        if not self.row.quantized:
            return None
        out, contracted = self.folds
        return out, contracted

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def dtype(self, param_dtype: np.typing.DTypeLike) -> np.dtype:
        """In memory, for a policy's param dtype."""
        if self.role in WIDE_ROLES:
            return np.dtype(param_dtype)
        return np.dtype(np.int32 if self.role == "table" else np.float32)


def folded(shape: tuple[int, ...], folds: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with so many neighbouring axes merged into each of its axes."""
    ends = itertools.accumulate(folds)
    return tuple(math.prod(shape[end - count : end]) for count, end in zip(folds, ends, strict=True))


def _compressor(path: str, width: str, part: Part, when: When) -> tuple[Row, ...]:
    # w branches of this width; the first of CSA's two is the overlap branch.
    return (
        Row(f"{path}/ape", f"m (w {width})", "position_bias", part, when),
        Row(f"{path}/wkv", f"(w {width}) D", "matrix", part, when, parted=True),
        Row(f"{path}/wgate", f"(w {width}) D", "matrix", part, when, parted=True),
        Row(f"{path}/norm", width, "norm", part, when),
    )


def _mixing(path: str, rows: str, scales: str, part: Part = "hyper_connections") -> tuple[Row, ...]:
    return (
        Row(f"{path}/fn", f"{rows} (N D)", "mixing", part, parted=rows == "M"),
        Row(f"{path}/base", rows, "mixing_bias", part),
        Row(f"{path}/scale", scales, "mixing_gate", part),
    )


MODEL_ROWS = (
    Row("embed", "V D", "embedding", "embedding"),
    Row("head", "V D", "head", "head"),
    Row("norm", "D", "norm", "norms"),
    *_mixing("hc_head", "N", "1"),
)

LAYER_ROWS = (
    Row("attn_norm", "D", "norm", "norms"),
    Row("ffn_norm", "D", "norm", "norms"),
    *_mixing("hc_attn", "M", "3"),
    *_mixing("hc_ffn", "M", "3"),
    Row("attn/attn_sink", "(G J)", "sink", "attention"),
    Row("attn/wq_a", "Q D", "matrix", "attention", quantized=True),
    Row("attn/q_norm", "Q", "norm", "attention"),
    Row("attn/wq_b", "(G J Dh) Q", "matrix", "attention", quantized=True),
    Row("attn/wkv", "Dh D", "matrix", "attention", quantized=True),
    Row("attn/kv_norm", "Dh", "norm", "attention"),
    Row("attn/wo_a", "(G O) (J Dh)", "matrix", "attention", quantized=True, parted=True),
    Row("attn/wo_b", "D (G O)", "matrix", "attention", quantized=True),
    *_compressor("attn/compressor", "Dh", "compressors", "compressed"),
    Row("attn/indexer/wq_b", "(Hi Di) Q", "matrix", "indexers", "csa", quantized=True),
    Row("attn/indexer/weights_proj", "Hi D", "matrix", "indexers", "csa"),
    *_compressor("attn/indexer/compressor", "Di", "indexers", "csa"),
    Row("ffn/gate/weight", "E D", "matrix", "moe"),
    Row("ffn/gate/bias", "E", "selection_bias", "moe", "learned"),
    Row("ffn/gate/tid2eid", "V Ke", "table", "moe", "hash"),
    Row("ffn/shared/gate_up", "2 | F D", "matrix", "moe", quantized=True),
    Row("ffn/shared/down", "D F", "matrix", "moe", quantized=True),
    Row("ffn/experts/gate_up", "E 2 | F D", "expert", "moe", quantized=True),
    Row("ffn/experts/down", "E | D F", "expert", "moe", quantized=True),
)

MTP_ROWS = (
    Row("e_proj", "D D", "matrix", "draft", quantized=True),
    Row("h_proj", "D D", "matrix", "draft", quantized=True),
    Row("enorm", "D", "norm", "draft"),
    Row("hnorm", "D", "norm", "draft"),
    Row("norm", "D", "norm", "draft"),
    *_mixing("hc_head", "N", "1", "draft"),
)
"""Besides a whole window layer with learned routing, under `block`."""

LORA = "lora"
"""Branch of a tree with the small matrices `a` and `b` of LoRA, at the path of the matrix they belong to."""

DSPARK_ROWS = (
    Row("main_proj", "D (C D)", "matrix", "draft", quantized=True),
    Row("main_norm", "D", "norm", "draft"),
    Row("norm", "D", "norm", "draft"),
    *_mixing("hc_head", "N", "1", "draft"),
    Row("markov_w1", "V Mr", "embedding", "draft"),
    Row("markov_w2", "V Mr", "head", "draft"),
    Row("confidence", "1 Dm", "matrix", "draft"),
)
"""Besides `DSPARK_STAGES` whole window layers with learned routing, under `stages`: a stack without a scan of
its own, R = 3."""

LETTERS = frozenset(
    letter
    for row in (*MODEL_ROWS, *LAYER_ROWS, *MTP_ROWS, *DSPARK_ROWS)
    for letter in re.findall(r"\w+", row.dims)
) | {"R"}
"""Of all dims that a parameter can have."""

_OF_MODEL, _OF_LAYER, _OF_MTP, _OF_DSPARK = (
    {tuple(row.path.split("/")): row for row in rows}
    for rows in (MODEL_ROWS, LAYER_ROWS, MTP_ROWS, DSPARK_ROWS)
)


def row_at(path: Path) -> Row:
    """The line of the table for a place in the tree of any model; for a small matrix of LoRA, its matrix'.

    Raises:
        KeyError: no model has a parameter there.
    """
    match path:
        case (branch, *rest, "a" | "b") if branch == LORA:
            return row_at(tuple(rest))
        case (
            ("stacks", int(), "blocks", int(), *rest)
            | ("mtp", int(), "block", *rest)
            | ("dspark", "stages", *rest)
        ):
            rows, key = _OF_LAYER, tuple(rest)
        case ("dspark", *rest):
            rows, key = _OF_DSPARK, tuple(rest)
        case ("mtp", int(), *rest):
            rows, key = _OF_MTP, tuple(rest)
        case _:
            rows, key = _OF_MODEL, path
    if key not in rows:
        raise KeyError(f"no parameter {'/'.join(map(str, path))} in the table")
    return rows[key]


def parameter_at(path: Path, shape: tuple[int, ...]) -> Parameter:
    """The parameter that an array of this shape is, at a place in the tree of any model.

    Raises:
        KeyError: no model has a parameter there.
        ValueError: it has another number of axes, or one letter stands for two sizes.
    """
    row = row_at(path)
    letters = re.findall(r"\w+", row.dims)
    repeats = shape[0] if len(shape) == len(letters) + 1 and path[0] in ("stacks", "mtp") else None
    own = shape if repeats is None else shape[1:]
    if len(own) == len(letters):
        root = path[: len(path) - len(row.path.split("/"))]
        parameter = _placed(row, root, repeats, dict(zip(letters, own, strict=True)))
        if parameter.shape == shape:
            return parameter
    raise ValueError(f"{'/'.join(map(str, path))} is [{row.dims}], not an array of {shape}")


def is_trained(path: Path) -> bool:
    """Whether the steps of training change the parameter there by gradients. They leave a DSpark head alone,
    which no term of their loss reads: weight decay would only wear it down."""
    return path[0] != "dspark" and row_at(path).role not in WITHOUT_GRADIENT


def applies(row: Row, attention: AttentionKind, router: RouterKind) -> bool:
    """Whether a layer of these kinds has the parameter."""
    if row.when == "compressed":
        return attention != "window"
    return row.when in ("always", attention, router)


def sizes(config: ModelConfig, attention: AttentionKind = "window") -> dict[str, int]:
    """The legend as numbers; w and m are those of an attention kind."""
    c = config
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "N": c.hc_mult,
        "M": (2 + c.hc_mult) * c.hc_mult,
        "G": c.o_groups,
        "J": c.heads_per_group,
        "Dh": c.head_dim,
        "Q": c.q_lora_rank,
        "O": c.o_lora_rank,
        "Hi": c.index_n_heads,
        "Di": c.index_head_dim,
        "E": c.n_routed_experts,
        "Ke": c.num_experts_per_tok,
        "F": c.moe_intermediate_size,
        "C": len(c.dspark.target_layer_ids) if c.dspark else 0,
        "Mr": c.dspark.markov_rank if c.dspark else 0,
        "Dm": c.hidden_size + c.dspark.markov_rank if c.dspark else 0,
        "w": config.branches(attention),
        "m": c.ratio(attention),
    }


@functools.lru_cache(maxsize=8)
def _table(config: ModelConfig) -> dict[Path, Parameter]:
    found = [_placed(row, (), None, sizes(config)) for row in MODEL_ROWS]
    for number, stack in enumerate(layer_stacks(config)):
        for block, (attention, router) in enumerate(stack.kinds):
            root: Path = ("stacks", number, "blocks", block)
            found += _layer(config, root, stack.repeats, attention, router)
    table = {parameter.path: parameter for parameter in found}
    for depth in range(config.num_nextn_predict_layers):
        table |= mtp_parameters(config, depth)
    if config.dspark is not None:
        table |= dspark_parameters(config)
    return table


def parameters(config: ModelConfig) -> dict[Path, Parameter]:
    """Every parameter of a model by its path in the tree."""
    return dict(_table(config))


def layers_of(config: ModelConfig, path: Path) -> tuple[int, ...]:
    """Layer numbers, one a repeat, that a parameter of a layer stack holds in its first axis.

    Args:
        config: of the model.
        path: ("stacks", number, "blocks", position, ...).
    """
    _, number, _, position, *_ = path
    stack = layer_stacks(config)[int(number)]
    return tuple(stack.layer_index(int(position), repeat) for repeat in range(stack.repeats))


def mtp_parameters(config: ModelConfig, depth: int) -> dict[Path, Parameter]:
    """Those of one MTP block, whether or not the model has it."""
    root: Path = ("mtp", depth)
    found = [_placed(row, root, None, sizes(config)) for row in MTP_ROWS]
    found += _layer(config, (*root, "block"), 1, "window", "learned")
    return {parameter.path: parameter for parameter in found}


def dspark_parameters(config: ModelConfig) -> dict[Path, Parameter]:
    """Those of the DSpark draft head of a config that has one."""
    root: Path = ("dspark",)
    found = [_placed(row, root, None, sizes(config)) for row in DSPARK_ROWS]
    found += _layer(config, (*root, "stages"), DSPARK_STAGES, "window", "learned")
    return {parameter.path: parameter for parameter in found}


def _layer(
    config: ModelConfig, root: Path, repeats: int, attention: AttentionKind, router: RouterKind
) -> list[Parameter]:
    numbers = sizes(config, attention)
    return [_placed(row, root, repeats, numbers) for row in LAYER_ROWS if applies(row, attention, router)]


def _placed(row: Row, root: Path, repeats: int | None, numbers: dict[str, int]) -> Parameter:
    before, _, after = row.dims.rpartition("|")
    leading = before.split()
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", after)]
    dims = (*leading, *(letter for group in groups for letter in group))
    shape = tuple(int(letter) if letter.isdigit() else numbers[letter] for letter in dims)
    if repeats is not None:
        dims, shape = ("R", *dims), (repeats, *shape)
    num_leading = len(leading) + (repeats is not None)
    path = (*root, *row.path.split("/"))
    return Parameter(path, dims, shape, num_leading, tuple(map(len, groups)), row)
