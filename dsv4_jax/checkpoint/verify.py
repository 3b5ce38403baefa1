"""Everything that can be wrong with a checkpoint, without keeping any of it."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np

from dsv4_jax.boxes import at
from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.files import CheckpointFiles, Progress
from dsv4_jax.checkpoint.manifest import Manifest, Options, open_manifest
from dsv4_jax.checkpoint.read import Findings, read_part
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify_checkpoint` found.

    Attributes:
        problems: reasons why the checkpoint is not loaded; none: it is.
        warnings: what is odd but harmless.
        config: of the model, if headers and config agree.
        layout: its naming, likewise.
        num_tensors: tensors whose values were looked at, scales included.
        num_bytes: their bytes.
        formats: storage formats ('plain', 'fp8', 'fp4') and the number of weights in each.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    config: ModelConfig | None = None
    layout: names.Layout | None = None
    num_tensors: int = 0
    num_bytes: int = 0
    formats: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether the checkpoint loads."""
        return not self.problems


def verify_checkpoint(
    directory: str | pathlib.Path,
    *,
    allow_links: str | pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks config, headers, side files and every value of a checkpoint; memory is one matrix.

    Never raises for a bad checkpoint.

    Args:
        directory: the checkpoint.
        allow_links: a folder that links may lead into.
        progress: called after each tensor with (its name, bytes read, bytes of all tensors).
    """
    try:
        with open_manifest(directory, Options(allow_links=allow_links)) as (
            files,
            manifest,
        ):
            findings = _scan(files, manifest, progress)
    except CheckpointError as error:
        return Verification(error.problems)
    read = [info for tensor in manifest.tensors for info in (tensor.info, tensor.scale) if info is not None]
    formats: dict[str, int] = {}
    for tensor in manifest.tensors:
        formats[tensor.format] = formats.get(tensor.format, 0) + 1
    return Verification(
        problems=tuple(findings.problems),
        warnings=(*manifest.warnings, *findings.warnings()),
        config=manifest.config,
        layout=manifest.layout,
        num_tensors=len(read),
        num_bytes=sum(info.num_bytes for info in read),
        formats=formats,
    )


def _scan(files: CheckpointFiles, manifest: Manifest, progress: Progress | None) -> Findings:
    findings, done = Findings(), 0
    total = sum(
        info.num_bytes
        for tensor in manifest.tensors
        for info in (tensor.info, tensor.scale)
        if info is not None
    )
    for tensor in manifest.tensors:
        dtype = np.dtype(np.int32 if tensor.spec.kind == "table" else np.float32)
        if tensor.format != "plain":
            dtype = np.dtype(ml_dtypes.bfloat16)
        parameter, dims = tensor.spec.parameter, tensor.spec.dims
        joined = dims[: len(dims) - len(parameter.own)]  # matrices that one tensor joins: one at a time
        matrix = np.empty((*(1 for _ in joined), *parameter.own), dtype)
        for place in np.ndindex(joined):
            read_part(
                tensor,
                files.read,
                at(place, dims),
                matrix,
                findings,
                num_experts=manifest.config.n_routed_experts,
                scan_weights=True,
            )
        for info in (tensor.info, tensor.scale):
            if info is not None:
                files.drop_pages(info.name)
                done += info.num_bytes
        if progress is not None:
            progress(tensor.info.name, done, total)
    return findings
