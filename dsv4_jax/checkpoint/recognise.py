"""Which family of checkpoints this is, which naming layout it uses, and refusals that settle the matter.

Both are decided by tensor names. What a config says about a draft head or a quantisation may mislead
(`num_nextn_predict_layers` is 1 in DSpark releases too). Each layout has a set of name patterns (numbers
replaced by `#`), generated from the rename table, so a name is recognised even where the config has no such
tensor, and the report can then say what is wrong with it.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable
from typing import Literal

from dsv4_jax.checkpoint.names import (
    DSPARK_ROWS,
    LAYER_PREFIX,
    LAYER_ROWS,
    LAYOUTS,
    MTP_ROWS,
    TOP_ROWS,
    Layout,
    Row,
    row_name,
    scale_name,
)
from dsv4_jax.config.io import DSPARK_NOTE, VISION_NOTE, VISION_REFUSAL
from dsv4_jax.reading.foreign import foreign_quantization, refused_method

# The official converter accepts these words for the official ones, and a leading `model.`.
_OFFICIAL_WORDS = {
    "self_attn": "attn",
    "mlp": "ffn",
    "weight_scale_inv": "scale",
    "e_score_correction_bias": "bias",
}


@dataclasses.dataclass(frozen=True)
class Naming:
    """Result of `identify`.

    Attributes:
        layout: None if no single layout holds all names.
        names: the layout's own name -> the name in the files (they differ for accepted aliases).
        unknown: names of no layout, in file order.
        problems: mixed layouts; one tensor under two names.
    """

    layout: Layout | None
    names: dict[str, str]
    unknown: list[str]
    problems: list[str]


def pattern(name: str) -> str:
    """The name with every numeric component replaced by `#`; `007` is not a number of ours."""
    return ".".join(
        "#" if word.isdecimal() and word.isascii() and str(int(word)) == word else word
        for word in name.split(".")
    )


@functools.cache
def _rows(layout: Layout) -> dict[str, Row]:
    groups = [("", TOP_ROWS), (f"{LAYER_PREFIX[layout]}#.", LAYER_ROWS)]
    if layout == "official":
        groups += [("mtp.#.", MTP_ROWS), ("mtp.", DSPARK_ROWS), ("mtp.#.", LAYER_ROWS)]
    known = {}
    for prefix, rows in groups:
        for row in rows:
            name = row_name(row, layout)
            if name is not None:
                name = pattern(prefix + name)  # expert numbers are `#` already
                known[name] = row
                if row.parameter.quantized:
                    known[scale_name(name, layout)] = row
    return known


def row_of(name: str, layout: Layout) -> Row | None:
    """The line of the rename table that a name of a layout (weight or scale) belongs to, if any."""
    return _rows(layout).get(pattern(name))


def own_name(name: str, layout: Layout) -> str:
    """The layout's own spelling of an accepted alias; other names come back unchanged."""
    if layout == "transformers":
        return name
    if layout == "official":
        words = name.removeprefix("model.").split(".")
        name = ".".join(_OFFICIAL_WORDS.get(word, word) for word in words)
        if name.endswith(".attn.norm.weight"):
            name = name.removesuffix("norm.weight") + "kv_norm.weight"
        return name
    if name.endswith(".attn.kv_norm.weight"):
        name = name.removesuffix("kv_norm.weight") + "norm.weight"
    if name.endswith(".weight_scale_inv"):
        return name.removesuffix("weight_scale_inv") + "scale"
    return name


def identify(names: Iterable[str]) -> Naming:
    """Finds the layout that every recognised name belongs to.

    Args:
        names: tensor names as they are in the files.
    """
    unknown: list[str] = []
    holders: dict[tuple[Layout, ...], list[str]] = {}  # layouts a name fits -> names
    for name in names:
        fits = tuple(lay for lay in LAYOUTS if row_of(own_name(name, lay), lay))
        if fits:
            holders.setdefault(fits, []).append(name)
        else:
            unknown.append(name)
    common = [lay for lay in LAYOUTS if holders and all(lay in fits for fits in holders)]
    if not common:
        problems = []
        if holders:
            counts = "; ".join(
                f"{len(held)} only {' or '.join(fits)} (such as {held[0]!r})"
                for fits, held in sorted(holders.items(), key=lambda item: -len(item[1]))
                if len(fits) < len(LAYOUTS)
            )
            problems.append(f"the tensor names mix naming layouts: {counts}")
        return Naming(None, {}, unknown, problems)
    layout = common[0]
    found: dict[str, str] = {}
    problems = []
    for held in holders.values():
        for name in held:
            own = own_name(name, layout)
            if own in found:
                problems.append(f"one tensor under two names: {found[own]!r} and {name!r}")
            else:
                found[own] = name
    return Naming(layout, found, unknown, problems)


DraftHead = Literal["load", "ignore"]


@dataclasses.dataclass(frozen=True)
class Recognised:
    """Result of `recognise`.

    Attributes:
        names: tensor names of what is loaded; what is left out is not among them.
        has_dspark: the checkpoint has a DSpark draft head; there is then no MTP block.
        refusals: if any, nothing else needs to be said about the checkpoint.
        warnings: what was left out.
    """

    names: list[str]
    has_dspark: bool
    refusals: list[str]
    warnings: list[str]


def recognise(
    names: Collection[str],
    *,
    has_dspark: bool,
    draft_head: DraftHead = "load",
    text_only: bool = False,
    require_mtp: bool = False,
) -> Recognised:
    """Sorts out the tensors that are not the text model's.

    Args:
        names: all tensor names in the files.
        has_dspark: the config says so (any `dspark_*` key).
        draft_head: what to do with a DSpark head: load it, or leave it out.
        text_only: leave a vision tower out instead of refusing it.
        require_mtp: the caller wants the MTP block, which a DSpark head is not.
    """
    refusals, warnings = [], []
    method = foreign_quantization(names)
    if method is not None:
        refusals.append(refused_method(method))
    kept = [name for name in names if not name.removeprefix("model.").startswith("vision.")]
    if len(kept) < len(names):
        if text_only:
            warnings.append(VISION_NOTE)
        else:
            refusals.append(VISION_REFUSAL)

    draft = {name: own_name(name, "official") for name in kept}
    draft = {name: own for name, own in draft.items() if own.startswith("mtp.")}
    described = has_dspark
    has_dspark = has_dspark or any(
        own.startswith("mtp.1.") or own == "mtp.0.main_proj.weight" for own in draft.values()
    )
    copies = set()
    if has_dspark:
        if require_mtp:
            refusals.append(f"{DSPARK_NOTE}; an MTP block was asked for and there is none")
        elif draft_head == "ignore":
            warnings.append(f"{DSPARK_NOTE}, which is left out")
            copies = set(draft)
        elif not described:
            refusals.append(
                f"{DSPARK_NOTE}, which config.json does not describe (no dspark_block_size and others);"
                " draft_head='ignore' loads the model without it"
            )
    else:
        copies = {name for name, own in draft.items() if "emb" in own or own.endswith("head.weight")}
    return Recognised([name for name in kept if name not in copies], has_dspark, refusals, warnings)
