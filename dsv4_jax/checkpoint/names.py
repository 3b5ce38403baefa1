"""The one bijection between tensor names on disk and parameters in memory.

`TOP_ROWS`, `LAYER_ROWS`, `MTP_ROWS` and `DSPARK_ROWS` are the whole rename table: a row is one tensor, with
its official name, its name in the transformers native layout, and the parameter that holds it; what that
parameter is says `dsv4_jax.parameters`. The hybrid layout (what `save_pretrained` writes by default) is the
official one with the prefix `model.` for layers and the other names of `_HYBRID`. Nothing else in the package
spells a tensor name.

A parameter has leading axes that a checkpoint spreads over several tensors: the repeats of a layer stack,
and for experts (expert, gate or up). `TensorSpec.index` selects in those; what is left has the official
elements in the official order, so a tensor and its place in the parameter differ by a reshape only.
"""

import dataclasses
import functools
from typing import Literal

from dsv4_jax import parameters
from dsv4_jax.config import DSPARK_STAGES, LayerStack, ModelConfig, layer_stacks
from dsv4_jax.parameters import Parameter, Path, Role

Layout = Literal["official", "transformers", "hybrid"]
LAYOUTS: tuple[Layout, ...] = ("official", "transformers", "hybrid")

Kind = Literal["matrix", "norm", "float32", "table"]
"""How official files hold a tensor that is not quantised: matrices and norms as BF16, the others as F32, hash
tables as I64."""


def kind_of(role: Role) -> Kind:
    """How official files hold parameters of a role."""
    if role in parameters.WIDE_ROLES:
        return "matrix"
    return {"norm": "norm", "table": "table"}.get(role, "float32")


_PARAMETER_ROWS = {
    row.path: row
    for row in (
        *parameters.MTP_ROWS,
        *parameters.DSPARK_ROWS,
        *parameters.MODEL_ROWS,
        *parameters.LAYER_ROWS,
    )
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the rename table.

    In `path` a number is an index into an axis of the parameter, and `#` is the expert's number. `joins`
    counts the parameter's axes that make up each axis of a tensor which is not cut as the official one is.
    """

    official: str | None
    transformers: str | None
    path: str
    joins: tuple[int, ...] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """Path of the parameter, without indices."""
        return tuple(word for word in self.path.split("/") if not (word == "#" or word.isdigit()))

    @property
    def parameter(self) -> parameters.Row:
        """What the table of parameters says of it; the same in every layer."""
        return _PARAMETER_ROWS["/".join(self.words)]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Where one tensor of a checkpoint lives in the parameter tree."""

    name: str  # in its layout
    scale_name: str | None  # of the block scales beside it when quantised; None: never quantised
    parameter: Parameter  # that it is, or is a part of
    index: tuple[int, ...]  # into the parameter's leading axes
    shape: tuple[int, ...]  # on disk: `dims` with some neighbours merged
    folds: tuple[int, ...]  # how many of `dims` make each axis of `shape`

    @property
    def path(self) -> Path:
        """Of the parameter."""
        return self.parameter.path

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the axes that `index` selects in."""
        return self.parameter.shape[: len(self.index)]

    @property
    def dims(self) -> tuple[int, ...]:
        """The parameter's other axes."""
        return self.parameter.shape[len(self.index) :]

    @property
    def kind(self) -> Kind:
        """How official files hold it unquantised."""
        return kind_of(self.parameter.role)


def _weight(official: str, transformers: str | None, path: str) -> Row:
    native = None if transformers is None else f"{transformers}.weight"
    return Row(f"{official}.weight", native, path)


def _compressor(official: str, native: str, path: str) -> tuple[Row, ...]:
    return (
        Row(f"{official}.ape", f"{native}.position_bias", f"{path}/ape"),
        _weight(f"{official}.wkv", f"{native}.kv_proj", f"{path}/wkv"),
        _weight(f"{official}.wgate", f"{native}.gate_proj", f"{path}/wgate"),
        _weight(f"{official}.norm", f"{native}.kv_norm", f"{path}/norm"),
    )


def _mixing(official: str, native: str) -> tuple[Row, ...]:
    return tuple(
        Row(f"{official}_{part}", f"{native}.{part}", f"{official}/{part}")
        for part in ("fn", "base", "scale")
    )


_COLLAPSE = tuple(
    Row(f"hc_head_{part}", f"model.hc_head.hc_{part}", f"hc_head/{part}") for part in ("fn", "base", "scale")
)

TOP_ROWS = (
    _weight("embed", "model.embed_tokens", "embed"),
    _weight("head", "lm_head", "head"),
    _weight("norm", "model.norm", "norm"),
    *_COLLAPSE,
)

_NATIVE_INDEXER = "self_attn.compressor.indexer"
_BIAS = "e_score_correction_bias"

# Names after `layers.N.` (official, and `mtp.0.`) or `model.layers.N.` (transformers).
LAYER_ROWS = (
    _weight("attn_norm", "input_layernorm", "attn_norm"),
    _weight("ffn_norm", "post_attention_layernorm", "ffn_norm"),
    *_mixing("hc_attn", "attn_hc"),
    *_mixing("hc_ffn", "ffn_hc"),
    Row("attn.attn_sink", "self_attn.sinks", "attn/attn_sink"),
    _weight("attn.wq_a", "self_attn.q_a_proj", "attn/wq_a"),
    _weight("attn.q_norm", "self_attn.q_a_norm", "attn/q_norm"),
    _weight("attn.wq_b", "self_attn.q_b_proj", "attn/wq_b"),
    _weight("attn.wkv", "self_attn.kv_proj", "attn/wkv"),
    _weight("attn.kv_norm", "self_attn.kv_norm", "attn/kv_norm"),
    _weight("attn.wo_a", "self_attn.o_a_proj", "attn/wo_a"),
    _weight("attn.wo_b", "self_attn.o_b_proj", "attn/wo_b"),
    *_compressor("attn.compressor", "self_attn.compressor", "attn/compressor"),
    _weight("attn.indexer.wq_b", f"{_NATIVE_INDEXER}.q_b_proj", "attn/indexer/wq_b"),
    _weight(
        "attn.indexer.weights_proj", f"{_NATIVE_INDEXER}.scorer.weights_proj", "attn/indexer/weights_proj"
    ),
    *_compressor("attn.indexer.compressor", _NATIVE_INDEXER, "attn/indexer/compressor"),
    _weight("ffn.gate", "mlp.gate", "ffn/gate/weight"),
    Row("ffn.gate.bias", f"mlp.gate.{_BIAS}", "ffn/gate/bias"),
    Row("ffn.gate.tid2eid", "mlp.gate.tid2eid", "ffn/gate/tid2eid"),
    # w1 is the gate, w3 the up projection
    _weight("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj", "ffn/shared/gate_up/0"),
    _weight("ffn.shared_experts.w3", "mlp.shared_experts.up_proj", "ffn/shared/gate_up/1"),
    _weight("ffn.shared_experts.w2", "mlp.shared_experts.down_proj", "ffn/shared/down"),
    _weight("ffn.experts.#.w1", None, "ffn/experts/gate_up/#/0"),
    _weight("ffn.experts.#.w3", None, "ffn/experts/gate_up/#/1"),
    _weight("ffn.experts.#.w2", None, "ffn/experts/down/#"),
    # transformers stacks the experts, and gate over up: [E, 2 F, D] and [E, D, F]
    Row(None, "mlp.experts.gate_up_proj", "ffn/experts/gate_up", joins=(1, 2, 1)),
    Row(None, "mlp.experts.down_proj", "ffn/experts/down", joins=(1, 1, 1)),
)

# Names after `mtp.0.`, besides a whole window layer with learned routing. transformers drops them.
MTP_ROWS = (
    *(_weight(name, None, name) for name in ("e_proj", "h_proj", "enorm", "hnorm", "norm")),
    *(dataclasses.replace(row, transformers=None) for row in _COLLAPSE),
)

# Names after `mtp.`, besides `DSPARK_STAGES` whole window layers with learned routing.
_LAST = DSPARK_STAGES - 1
DSPARK_ROWS = (
    _weight("0.main_proj", None, "main_proj"),
    _weight("0.main_norm", None, "main_norm"),
    _weight(f"{_LAST}.norm", None, "norm"),
    *(dataclasses.replace(row, official=f"{_LAST}.{row.official}", transformers=None) for row in _COLLAPSE),
    _weight(f"{_LAST}.markov_head.markov_w1", None, "markov_w1"),
    _weight(f"{_LAST}.markov_head.markov_w2", None, "markov_w2"),
    _weight(f"{_LAST}.confidence_head.proj", None, "confidence"),
)

_HYBRID = {  # official -> hybrid, where it is more than the prefix `model.` of layers
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "attn.kv_norm.weight": "attn.norm.weight",
}
LAYER_PREFIX: dict[Layout, str] = {
    "official": "layers.",
    "transformers": "model.layers.",
    "hybrid": "model.layers.",
}


def row_name(row: Row, layout: Layout) -> str | None:
    """The row's name in a layout, without a layer prefix; None if the layout has no such tensor."""
    if layout == "transformers":
        return row.transformers
    if layout == "hybrid" and row.official is not None:
        return _HYBRID.get(row.official, row.official)
    return row.official


def scale_name(name: str, layout: Layout) -> str:
    """Name of the block scales of a quantised tensor.

    Only ever applied to names of the table: `attn_hc.scale` and `hc_head.hc_scale` are parameters,
    and a blanket rename of `.scale` corrupts them.
    """
    if layout == "transformers":
        return f"{name}_scale_inv"  # X.weight_scale_inv; stacked experts: gate_up_proj_scale_inv
    return f"{name.removesuffix('.weight')}.scale"


def _specs(
    row: Row,
    layout: Layout,
    prefix: str,
    table: dict[Path, Parameter],
    root: Path,
    repeat: int | None,
    experts: int | None = None,
) -> list[TensorSpec]:
    """The tensors of a row in one place; none without such a parameter, or without a name in the layout."""
    short, parameter = row_name(row, layout), table.get((*root, *row.words))
    if short is None or parameter is None:
        return []
    before = () if repeat is None else (repeat,)
    half = tuple(int(word) for word in row.path.split("/") if word.isdigit())
    if "#" in row.path:
        num_experts = parameter.shape[len(before)] if experts is None else experts
        indices = [(*before, expert, *half) for expert in range(num_experts)]
    else:
        indices = [(*before, *half)]
    folds = parameter.folds if row.joins is None else row.joins
    shape = parameters.folded(parameter.shape[len(parameter.shape) - sum(folds) :], folds)
    specs = []
    for index in indices:
        name = prefix + (short.replace("#", str(index[len(before)])) if "#" in short else short)
        scales = scale_name(name, layout) if row.parameter.quantized else None
        specs.append(TensorSpec(name, scales, parameter, index, shape, folds))
    return specs


@functools.lru_cache(maxsize=64)
def _stack_of_layer(config: ModelConfig) -> tuple[tuple[int, LayerStack, int, int], ...]:
    places = {
        stack.layer_index(block, repeat): (number, stack, block, repeat)
        for number, stack in enumerate(layer_stacks(config))
        for block in range(len(stack.kinds))
        for repeat in range(stack.repeats)
    }
    return tuple(places[layer] for layer in range(config.num_hidden_layers))


@functools.lru_cache(maxsize=8)
def layout_tensors(
    config: ModelConfig, layout: Layout = "official", experts: int | None = None
) -> tuple[TensorSpec, ...]:
    """Every tensor of a checkpoint of `config` in `layout`: weights only, without block scales.

    The transformers layouts hold no MTP block and no DSpark head.

    Args:
        config: of the model.
        layout: naming.
        experts: list so many experts of each layer instead of all. They are alike, so that 1 is enough for
            counting, and takes no longer for a config that claims millions.
    """
    table = parameters.parameters(config)
    specs = [spec for row in TOP_ROWS for spec in _specs(row, layout, "", table, (), None)]
    for layer, (number, _, block, repeat) in enumerate(_stack_of_layer(config)):
        root: Path = ("stacks", number, "blocks", block)
        prefix = f"{LAYER_PREFIX[layout]}{layer}."
        for row in LAYER_ROWS:
            specs += _specs(row, layout, prefix, table, root, repeat, experts)
    if layout == "official":
        for depth in range(config.num_nextn_predict_layers):
            specs += mtp_tensors(config, depth, experts)
        if config.dspark is not None:
            specs += dspark_tensors(config, experts)
    return tuple(specs)


def mtp_tensors(config: ModelConfig, depth: int = 0, experts: int | None = None) -> list[TensorSpec]:
    """The official tensors of one MTP block: its own rows, and a window layer, learned routing."""
    table = parameters.mtp_parameters(config, depth)
    prefix, root = f"mtp.{depth}.", ("mtp", depth)
    specs = [spec for row in MTP_ROWS for spec in _specs(row, "official", prefix, table, root, None)]
    for row in LAYER_ROWS:
        specs += _specs(row, "official", prefix, table, (*root, "block"), 0, experts)
    return specs


def dspark_tensors(config: ModelConfig, experts: int | None = None) -> list[TensorSpec]:
    """The official tensors of the DSpark head of a config that has one."""
    table = parameters.dspark_parameters(config)
    specs = [
        spec for row in DSPARK_ROWS for spec in _specs(row, "official", "mtp.", table, ("dspark",), None)
    ]
    for stage in range(DSPARK_STAGES):
        for row in LAYER_ROWS:
            root: Path = ("dspark", "stages")
            specs += _specs(row, "official", f"mtp.{stage}.", table, root, stage, experts)
    return specs


def official_tensors(config: ModelConfig, experts: int | None = None) -> tuple[TensorSpec, ...]:
    """`layout_tensors` of the official layout."""
    return layout_tensors(config, "official", experts)


def is_one_expert(name: str) -> bool:
    """Whether a tensor is of a single routed expert, one of E alike; False for a stack of them."""
    return ".experts." in name and name.partition(".experts.")[2].partition(".")[0].isdecimal()


def num_tensors(config: ModelConfig, layout: Layout) -> int:
    """Number of `layout_tensors`, found without listing every expert."""
    listed = layout_tensors(config, layout, 1)
    numbered = sum(is_one_expert(spec.name) for spec in listed)
    return len(listed) + (config.n_routed_experts - 1) * numbered
