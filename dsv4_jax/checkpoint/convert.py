"""One checkpoint to another: naming layout and dtype."""

import pathlib
from collections.abc import Callable
from typing import Literal

from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.load import Weights, load_checkpoint
from dsv4_jax.checkpoint.manifest import Options, open_manifest
from dsv4_jax.checkpoint.release import DraftHead
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.checkpoint.storage import BASE, PREVIEW
from dsv4_jax.numerics.policy import Policy

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its name, the bytes done, and the bytes of all tensors."""

Target = Literal["keep", "bfloat16", "float32", "fp8", "fp8-fp4"]
"""How the weights of the result are stored; 'fp8-fp4' as in the instruct releases, 'fp8' as in Base."""

_RELEASES = {"fp8": BASE, "fp8-fp4": PREVIEW}
_STORED_NAME = {"bfloat16": "BF16", "float32": "F32"}


def convert_checkpoint(
    source: str | pathlib.Path,
    destination: str | pathlib.Path,
    *,
    layout: names.Layout = "official",
    to: Target = "keep",
    draft_head: DraftHead = "refuse",
    overwrite: bool = False,
    reading: Progress | None = None,
    writing: Progress | None = None,
) -> list[str]:
    """Loads `source` and saves it to `destination`; the weights are held in host memory in between.

    Args:
        source: checkpoint directory in any layout.
        destination: new or empty directory, or with `overwrite` a checkpoint to replace.
        layout: naming of the result.
        to: of matrices and norms. 'keep' keeps each tensor as it is stored, byte for byte; the transformers
            layouts hold no FP4, there quantised weights become bfloat16, which holds them exactly.
            'bfloat16' and 'float32' dequantise. 'bfloat16' leaves those norms float32 that it would
            change. float32 parameters (mHC, sinks, biases) always stay float32. 'fp8-fp4' and 'fp8' round
            weights to the official formats and need the official layout; weights in the wanted format
            stay as they are.
        draft_head: 'ignore' leaves a DSpark draft head out instead of refusing the checkpoint.
        overwrite: replace what is at `destination`.
        reading, writing: progress of the two halves.

    Returns:
        Warnings for the user.

    Raises:
        CheckpointError: with all problems; `destination` is then as it was.
    """
    in_memory = to if to in _STORED_NAME else _widest_matrix(source, draft_head)
    weights: Weights = "dequantized" if to in _STORED_NAME else "native"
    loaded = load_checkpoint(
        source, Policy.of(in_memory), weights=weights, draft_head=draft_head, progress=reading
    )
    stored = loaded.stored
    if to in _STORED_NAME:
        stored = {
            spec.name: _STORED_NAME[to]
            for spec in names.official_tensors(loaded.config)
            if spec.kind in ("matrix", "norm")
        }
    warnings = save_checkpoint(
        destination,
        loaded.config,
        loaded.parameters,
        layout=layout,
        stored=stored,
        release=_RELEASES.get(to),
        copy_from=source,
        overwrite=overwrite,
        progress=writing,
    )
    return [*loaded.warnings, *warnings]


def _widest_matrix(source: str | pathlib.Path, draft_head: DraftHead) -> str:
    """The dtype that holds every matrix of the checkpoint exactly."""
    with open_manifest(source, Options(draft_head=draft_head)) as (_, manifest):
        plain = {
            entry.tensor.dtype
            for entry in manifest.entries
            if entry.format == "plain" and entry.spec.kind == "matrix"
        }
    return "bfloat16" if plain <= {"BF16"} else "float32"
