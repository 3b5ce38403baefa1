"""Which family of checkpoints this is, and the refusals that make every other question moot.

What a config says about a draft head or a quantisation may mislead (`num_nextn_predict_layers` is 1
in DSpark releases too), so tensor names decide as well.
"""

import dataclasses
from collections.abc import Collection
from typing import Literal

from dsv4_jax.checkpoint.layout import own_name
from dsv4_jax.config.io import DSPARK_NOTE, VISION_NOTE, VISION_REFUSAL
from dsv4_jax.reading.foreign import foreign_quantization, refused_method

DraftHead = Literal["refuse", "ignore"]


@dataclasses.dataclass(frozen=True)
class Release:
    """Result of `recognise`.

    Attributes:
        names: tensor names of the model itself, draft heads and vision towers left out.
        has_dspark: a DSpark draft head is among the tensors; there is then no MTP block.
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
    draft_head: DraftHead = "refuse",
    text_only: bool = False,
    require_mtp: bool = False,
) -> Release:
    """Sorts out the tensors that are not the text model's.

    Args:
        names: all tensor names in the files.
        has_dspark: the config says so (any `dspark_*` key).
        draft_head: what to do with a DSpark head: refuse the checkpoint, or leave the head out.
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
    has_dspark = has_dspark or any(
        own.startswith("mtp.1.") or own == "mtp.0.main_proj.weight" for own in draft.values()
    )
    if has_dspark:
        if require_mtp:
            refusals.append(f"{DSPARK_NOTE}; an MTP block was asked for and there is none")
        elif draft_head == "refuse":
            refusals.append(f"{DSPARK_NOTE}; draft_head='ignore' loads the model without it")
        else:
            warnings.append(DSPARK_NOTE)
        copies = set(draft)
    else:
        copies = {name for name, own in draft.items() if "emb" in own or own.endswith("head.weight")}
    return Release([name for name in kept if name not in copies], has_dspark, refusals, warnings)
