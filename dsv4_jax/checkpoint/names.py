"""The one bijection between tensor names on disk and parameters in memory.

`TOP_ROWS`, `LAYER_ROWS` and `MTP_ROWS` are the whole rename table: a row is one tensor, with its
official name, its name in the transformers native layout, the parameter that holds it, and its
shape. The hybrid layout (what `save_pretrained` writes by default) is the official one with the
prefix `model.` for layers and the other names of `_HYBRID`. Nothing else in the package spells a
tensor name.

A parameter has leading axes that a checkpoint spreads over several tensors: the repeats of a layer
stack, and for routed experts (expert, gate or up). `TensorSpec.index` selects in those; what is
left has the official elements in the official order, so a tensor and its place in the parameter
differ by a reshape only.
"""

import dataclasses
import functools
import math
import re
from typing import Literal

from dsv4_jax.config import AttentionKind, LayerStack, ModelConfig, RouterKind, layer_stacks

Layout = Literal["official", "transformers", "hybrid"]
LAYOUTS: tuple[Layout, ...] = ("official", "transformers", "hybrid")

Kind = Literal["matrix", "norm", "float32", "table"]
"""matrix: the policy's param dtype. norm, float32: float32 in memory; official files hold norms as
BF16 and the others as F32. table: int32 in memory, I64 on disk."""

When = Literal["always", "compressed", "csa", "hash", "learned"]
"""Which layers have a tensor; compressed: csa or hca."""

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the rename table. `dims` are the parameter's; parentheses merge them on disk."""

    official: str | None
    transformers: str | None
    path: str
    dims: str
    kind: Kind
    when: When = "always"
    quantized: bool = False  # official releases store it with block scales


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Where one tensor of a checkpoint lives in the parameter tree."""

    name: str  # in its layout
    scale_name: str | None  # of the block scales beside it when quantised; None: never quantised
    path: Path  # of the parameter
    index: tuple[int, ...]  # into the parameter's leading axes
    leading: tuple[int, ...]  # sizes of those axes
    dims: tuple[int, ...]  # the parameter's remaining dims
    shape: tuple[int, ...]  # on disk: `dims` with some neighbours merged
    kind: Kind

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.leading + self.dims


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """Shape and kind of one parameter of the tree."""

    leading: tuple[int, ...]  # axes that the official layout spreads over tensors
    dims: tuple[int, ...]  # the others
    stored: tuple[int, ...]  # shape of one official tensor
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.leading + self.dims

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _weight(
    official: str,
    transformers: str | None,
    path: str,
    dims: str,
    when: When = "always",
    kind: Kind = "matrix",
    quantized: bool = False,
) -> Row:
    native = None if transformers is None else f"{transformers}.weight"
    return Row(f"{official}.weight", native, path, dims, kind, when, quantized)


_norm = functools.partial(_weight, kind="norm")
_linear = functools.partial(_weight, quantized=True)


def _compressor(official: str, native: str, path: str, width: str, when: When) -> tuple[Row, ...]:
    # w branches of this width: the first is the overlap branch of CSA
    dims = f"(w {width}) D"
    ape = f"m (w {width})"
    return (
        Row(f"{official}.ape", f"{native}.position_bias", f"{path}/ape", ape, "float32", when),
        _weight(f"{official}.wkv", f"{native}.kv_proj", f"{path}/wkv", dims, when),
        _weight(f"{official}.wgate", f"{native}.gate_proj", f"{path}/wgate", dims, when),
        _norm(f"{official}.norm", f"{native}.kv_norm", f"{path}/norm", width, when),
    )


def _mixing(official: str, native: str) -> tuple[Row, ...]:
    return (
        Row(f"{official}_fn", f"{native}.fn", f"{official}/fn", "M (N D)", "float32"),
        Row(f"{official}_base", f"{native}.base", f"{official}/base", "M", "float32"),
        Row(f"{official}_scale", f"{native}.scale", f"{official}/scale", "3", "float32"),
    )


_COLLAPSE = (
    Row("hc_head_fn", "model.hc_head.hc_fn", "hc_head/fn", "N (N D)", "float32"),
    Row("hc_head_base", "model.hc_head.hc_base", "hc_head/base", "N", "float32"),
    Row("hc_head_scale", "model.hc_head.hc_scale", "hc_head/scale", "1", "float32"),
)

TOP_ROWS = (
    _weight("embed", "model.embed_tokens", "embed", "V D"),
    _weight("head", "lm_head", "head", "V D"),
    _norm("norm", "model.norm", "norm", "D"),
    *_COLLAPSE,
)

_NATIVE_INDEXER = "self_attn.compressor.indexer"
_BIAS = "e_score_correction_bias"

# Names after `layers.N.` (official, and `mtp.0.`) or `model.layers.N.` (transformers). In a path, a
# number is an index into a leading axis of the parameter, and `#` is the expert's number.
LAYER_ROWS = (
    _norm("attn_norm", "input_layernorm", "attn_norm", "D"),
    _norm("ffn_norm", "post_attention_layernorm", "ffn_norm", "D"),
    *_mixing("hc_attn", "attn_hc"),
    *_mixing("hc_ffn", "ffn_hc"),
    Row("attn.attn_sink", "self_attn.sinks", "attn/attn_sink", "(G J)", "float32"),
    _linear("attn.wq_a", "self_attn.q_a_proj", "attn/wq_a", "Q D"),
    _norm("attn.q_norm", "self_attn.q_a_norm", "attn/q_norm", "Q"),
    _linear("attn.wq_b", "self_attn.q_b_proj", "attn/wq_b", "(G J Dh) Q"),
    _linear("attn.wkv", "self_attn.kv_proj", "attn/wkv", "Dh D"),
    _norm("attn.kv_norm", "self_attn.kv_norm", "attn/kv_norm", "Dh"),
    _linear("attn.wo_a", "self_attn.o_a_proj", "attn/wo_a", "(G O) (J Dh)"),
    _linear("attn.wo_b", "self_attn.o_b_proj", "attn/wo_b", "D (G O)"),
    *_compressor("attn.compressor", "self_attn.compressor", "attn/compressor", "Dh", "compressed"),
    _linear("attn.indexer.wq_b", f"{_NATIVE_INDEXER}.q_b_proj", "attn/indexer/wq_b", "(Hi Di) Q", "csa"),
    _weight(
        "attn.indexer.weights_proj",
        f"{_NATIVE_INDEXER}.scorer.weights_proj",
        "attn/indexer/weights_proj",
        "Hi D",
        "csa",
    ),
    *_compressor("attn.indexer.compressor", _NATIVE_INDEXER, "attn/indexer/compressor", "Di", "csa"),
    _weight("ffn.gate", "mlp.gate", "ffn/gate/weight", "E D"),
    Row("ffn.gate.bias", f"mlp.gate.{_BIAS}", "ffn/gate/bias", "E", "float32", "learned"),
    Row("ffn.gate.tid2eid", "mlp.gate.tid2eid", "ffn/gate/tid2eid", "V Ke", "table", "hash"),
    # w1 is the gate, w3 the up projection
    _linear("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj", "ffn/shared/gate_up/0", "F D"),
    _linear("ffn.shared_experts.w3", "mlp.shared_experts.up_proj", "ffn/shared/gate_up/1", "F D"),
    _linear("ffn.shared_experts.w2", "mlp.shared_experts.down_proj", "ffn/shared/down", "D F"),
    _linear("ffn.experts.#.w1", None, "ffn/experts/gate_up/#/0", "F D"),
    _linear("ffn.experts.#.w3", None, "ffn/experts/gate_up/#/1", "F D"),
    _linear("ffn.experts.#.w2", None, "ffn/experts/down/#", "D F"),
    Row(
        None,
        "mlp.experts.gate_up_proj",
        "ffn/experts/gate_up",
        "E (2 F) D",
        "matrix",
        quantized=True,
    ),
    Row(None, "mlp.experts.down_proj", "ffn/experts/down", "E D F", "matrix", quantized=True),
)

# Names after `mtp.0.`, besides a whole window layer with learned routing. transformers drops them.
MTP_ROWS = (
    _linear("e_proj", None, "e_proj", "D D"),
    _linear("h_proj", None, "h_proj", "D D"),
    _norm("enorm", None, "enorm", "D"),
    _norm("hnorm", None, "hnorm", "D"),
    _norm("norm", None, "norm", "D"),
    *(dataclasses.replace(row, transformers=None) for row in _COLLAPSE),
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


def applies(row: Row, attention: AttentionKind, router: RouterKind) -> bool:
    """Whether a layer of these kinds has the tensor."""
    if row.when == "compressed":
        return attention != "window"
    return row.when in ("always", attention, router)


def dim_sizes(config: ModelConfig, attention: AttentionKind = "window") -> dict[str, int]:
    """The dimension legend of `config.py` as numbers; w and m are those of an attention kind."""
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
        "w": 2 if attention == "csa" else 1,
        "m": c.ratio(attention),
    }


def _shapes(dims: str, sizes: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(dims of the parameter, shape on disk) of a row."""
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", dims)]
    numbers = [[int(d) if d.isdigit() else sizes[d] for d in group] for group in groups]
    return tuple(n for group in numbers for n in group), tuple(math.prod(g) for g in numbers)


def _specs(
    row: Row,
    layout: Layout,
    prefix: str,
    root: Path,
    place: tuple[tuple[int, int], ...],
    sizes: dict[str, int],
    experts: int | None = None,
) -> list[TensorSpec]:
    """The tensors of a row; `place`: (index, size) of the leading axes before the row's own."""
    short = row_name(row, layout)
    if short is None:
        return []
    dims, shape = _shapes(row.dims, sizes)
    words = [word for word in row.path.split("/") if not (word == "#" or word.isdigit())]
    half = [(int(word), 2) for word in row.path.split("/") if word.isdigit()]
    specs = []
    listed = sizes["E"] if experts is None else experts
    for expert in range(listed if "#" in row.path else 1):
        axes = (*place, *([(expert, sizes["E"])] if "#" in row.path else []), *half)
        name = prefix + short.replace("#", str(expert))
        specs.append(
            TensorSpec(
                name=name,
                scale_name=scale_name(name, layout) if row.quantized else None,
                path=(*root, *words),
                index=tuple(i for i, _ in axes),
                leading=tuple(size for _, size in axes),
                dims=dims,
                shape=shape,
                kind=row.kind,
            )
        )
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

    The transformers layouts hold no MTP block.

    Args:
        config: of the model.
        layout: naming.
        experts: list so many experts of each layer instead of all. They are alike, so that 1 is enough for
            counting, and takes no longer for a config that claims millions.
    """
    sizes = dim_sizes(config)
    specs = [spec for row in TOP_ROWS for spec in _specs(row, layout, "", (), (), sizes)]
    for layer, (number, stack, block, repeat) in enumerate(_stack_of_layer(config)):
        attention, router = stack.kinds[block]
        root: Path = ("stacks", number, "blocks", block)
        prefix = f"{LAYER_PREFIX[layout]}{layer}."
        sizes = dim_sizes(config, attention)
        for row in LAYER_ROWS:
            if applies(row, attention, router):
                specs += _specs(row, layout, prefix, root, ((repeat, stack.repeats),), sizes, experts)
    if layout == "official":
        for depth in range(config.num_nextn_predict_layers):
            specs += mtp_tensors(config, depth, experts)
    return tuple(specs)


def mtp_tensors(config: ModelConfig, depth: int = 0, experts: int | None = None) -> list[TensorSpec]:
    """The official tensors of one MTP block: its own rows, and a window layer, learned routing."""
    sizes = dim_sizes(config)
    prefix, root = f"mtp.{depth}.", ("mtp", depth)
    specs = [spec for row in MTP_ROWS for spec in _specs(row, "official", prefix, root, (), sizes)]
    for row in LAYER_ROWS:
        if applies(row, "window", "learned"):
            specs += _specs(row, "official", prefix, (*root, "block"), ((0, 1),), sizes, experts)
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


@functools.lru_cache(maxsize=8)
def _parameters(config: ModelConfig) -> dict[Path, ParameterSpec]:
    return {s.path: ParameterSpec(s.leading, s.dims, s.shape, s.kind) for s in official_tensors(config, 1)}


def parameters(config: ModelConfig) -> dict[Path, ParameterSpec]:
    """Path -> shape and kind of every parameter of the model, from the same table."""
    return dict(_parameters(config))
