"""One checkpoint to another: naming layout and dtype."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Literal

from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.files import Progress
from dsv4_jax.checkpoint.load import Loaded, exact_dtype, load_checkpoint, stored_dtypes
from dsv4_jax.checkpoint.manifest import Options, open_manifest
from dsv4_jax.checkpoint.read import Findings, stored_parameters
from dsv4_jax.checkpoint.recognise import DraftHead
from dsv4_jax.checkpoint.save import (
    MAX_SHARD_BYTES,
    non_finite_problems,
    option_problems,
    save_checkpoint,
    write_held,
)
from dsv4_jax.checkpoint.storage import BASE, PREVIEW
from dsv4_jax.checkpoint.write import target_problems
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.refusing import refused_together
from sharding.activations import Placement

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
    draft_head: DraftHead = "load",
    overwrite: bool = False,
    allow_links: str | pathlib.Path | None = None,
    placement: Placement | None = None,
    reading: Progress | None = None,
    writing: Progress | None = None,
) -> list[str]:
    """Reads `source` twice, to look at every number and to write it to `destination`.

    Host memory holds one tensor at a time, or a few while one is rounded. With a placement everything is read
    once, onto its devices, and written from there: the same files. With several processes each reads and
    writes a part, and all must call this, with folders that all of them see.

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
        draft_head: 'ignore' leaves a DSpark draft head out.
        overwrite: replace what is at `destination`.
        allow_links: a folder that links of `source` may lead into.
        placement: mesh and rules by which the parameters are spread; None: they stay in the files.
        reading, writing: progress of looking at all numbers, and of writing.

    Returns:
        Warnings for the user.

    Raises:
        CheckpointError: with all problems; `destination` is then as it was.
        ProblemsError: rules that do not fit the mesh or the parameters.
    """
    if placement is not None:
        read = functools.partial(
            _on_devices,
            source,
            destination,
            layout,
            to,
            draft_head,
            overwrite,
            allow_links,
            placement,
            reading,
        )
        return _written(refused_together(read), destination, layout, to, overwrite, writing)
    problems = _destination_problems(source, destination, overwrite)
    if problems:  # before hours of reading
        raise CheckpointError(f"cannot convert to {destination}", problems)
    release = _RELEASES.get(to)
    with open_manifest(source, Options(draft_head=draft_head, allow_links=allow_links)) as (files, manifest):
        config, findings = manifest.config, Findings()
        if problems := option_problems(config, layout, release):
            raise CheckpointError(f"cannot save to {destination}", problems)
        held = stored_parameters(
            files,
            manifest,
            Policy.of(to).param_dtype if to in _STORED_NAME else exact_dtype(manifest),
            findings,
            keep_quantized=to not in _STORED_NAME,
            scan_weights=False,  # `non_finite_problems` does it
            progress=reading,
        )
        problems = non_finite_problems(config, held)
        if findings.problems:
            raise CheckpointError(f"checkpoint {source} cannot be used", findings.problems)
        if problems:
            raise CheckpointError(f"cannot save to {destination}", problems)
        warnings = [*manifest.warnings, *findings.warnings()]
        stored = stored_dtypes(manifest, held)
        stored = _recorded(config, stored, to)
        warnings += write_held(
            destination,
            config,
            held,
            layout=layout,
            stored=stored,
            side_files=manifest.side_files.contents,
            more_files={},
            release=release,
            max_shard_bytes=MAX_SHARD_BYTES,
            overwrite=overwrite,
            progress=writing,
            last_check=files.check_unchanged,
        )
    return warnings


def _recorded(config: ModelConfig, stored: Mapping[str, str], to: Target) -> Mapping[str, str]:
    """Official name -> dtype that the result has where that loses nothing."""
    if to not in _STORED_NAME:
        return stored
    wide = [spec.name for spec in names.official_tensors(config) if spec.kind in ("matrix", "norm")]
    return dict.fromkeys(wide, _STORED_NAME[to])


def _on_devices(
    source, destination, layout, to, draft_head, overwrite, allow_links, placement, reading
) -> Loaded:
    """The source, read onto the devices of this process, once nothing is in the way of writing it."""
    problems = _destination_problems(source, destination, overwrite)
    if not problems:
        with open_manifest(source, Options(draft_head=draft_head, allow_links=allow_links)) as (_, manifest):
            problems = option_problems(manifest.config, layout, _RELEASES.get(to))
    if problems:
        raise CheckpointError(f"cannot convert to {destination}", problems)
    return load_checkpoint(
        source,
        Policy.of(to) if to in _STORED_NAME else None,
        weights="dequantized" if to in _STORED_NAME else "native",
        draft_head=draft_head,
        allow_links=allow_links,
        mesh=placement.mesh,
        rules=placement.table.parameters,
        progress=reading,
    )


def _written(loaded: Loaded, destination, layout, to, overwrite, writing) -> list[str]:
    """Writes parameters that are on devices, and gives all warnings."""
    return [
        *loaded.warnings,
        *save_checkpoint(
            destination,
            loaded.config,
            loaded.parameters,
            layout=layout,
            stored=_recorded(loaded.config, loaded.stored, to),
            side_files=loaded.side_files,
            release=_RELEASES.get(to),
            overwrite=overwrite,
            progress=writing,
        ),
    ]


def _destination_problems(
    source: str | pathlib.Path, destination: str | pathlib.Path, overwrite: bool
) -> list[str]:
    try:
        read, written = pathlib.Path(source).resolve(), pathlib.Path(destination).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; a cycle of links
        return [f"{destination!r}: {error}"]
    if read == written or read in written.parents or written in read.parents:
        return [f"{destination}: is {source} itself, or one lies in the other"]
    return target_problems(destination, overwrite)
