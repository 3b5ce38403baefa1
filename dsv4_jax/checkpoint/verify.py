"""Everything that can be wrong with a checkpoint, without keeping any of it."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dsv4_jax.boxes import at, places
from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.files import CheckpointFiles, Progress
from dsv4_jax.checkpoint.load import blocks_of, exact_dtype
from dsv4_jax.checkpoint.manifest import Manifest, Options, open_manifest
from dsv4_jax.checkpoint.read import Findings, read_part, stored_parameters
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import CheckpointError
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.parameters import parameters
from dsv4_jax.refusing import refused_together
from sharding.activations import Placement
from sharding.agreement import collected
from sharding.placement import own_boxes


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
        bytes_a_device: of parameters, as each device of the mesh that was asked about would hold them.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    config: ModelConfig | None = None
    layout: names.Layout | None = None
    num_tensors: int = 0
    num_bytes: int = 0
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_a_device: int | None = None

    @property
    def sound(self) -> bool:
        """Whether the checkpoint loads."""
        return not self.problems


def verify_checkpoint(
    directory: str | pathlib.Path,
    *,
    allow_links: str | pathlib.Path | None = None,
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks config, headers, side files and every value of a checkpoint; memory is one matrix.

    Never raises for a bad checkpoint.

    With a placement the checkpoint is read as `load` reads it onto that mesh, one matrix of a device's part
    at a time. Of several processes, which must all call this, each reads what its own devices would hold, and
    all get what any of them found.

    Args:
        directory: the checkpoint.
        allow_links: a folder that links may lead into.
        placement: mesh and rules by which the parameters would be spread; None: no mesh is asked about.
        progress: called after each tensor with (its name, bytes read, bytes of all tensors).

    Raises:
        ProblemsError: for rules that do not fit the mesh or the parameters.
    """
    if placement is None:
        return _verified(directory, allow_links, _scan, progress)
    scan = functools.partial(_scan_own, placement, str(directory))
    own = refused_together(lambda: _verified(directory, allow_links, scan, progress))
    problems, warnings = (
        tuple(dict.fromkeys(each for lines in collected(list(said)) for each in lines))
        for said in (own.problems, own.warnings)
    )
    return dataclasses.replace(own, problems=problems, warnings=warnings)


def _verified(directory, allow_links, scan: Callable[..., Any], progress) -> Verification:
    try:
        with open_manifest(directory, Options(allow_links=allow_links)) as (
            files,
            manifest,
        ):
            findings, bytes_a_device = scan(files, manifest, progress)
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
        bytes_a_device=bytes_a_device,
    )


def _scan_own(
    placement: Placement, source: str, files: CheckpointFiles, manifest: Manifest, progress: Progress | None
) -> tuple[Findings, int]:
    """What this process's devices would hold, and the bytes of one of them."""
    findings, config = Findings(), manifest.config
    held = stored_parameters(
        files,
        manifest,
        exact_dtype(manifest),
        findings,
        keep_quantized=True,
        scan_weights=True,
        progress=progress,
    )
    shardings = parameter_shardings(
        config, placement.mesh, placement.table.parameters, source, blocks_of(held)
    )
    bytes_a_device = 0
    for path, parameter in held.items():
        num_leading = parameters(config)[path].num_leading
        for number, (box, _) in enumerate(own_boxes(parameter.shape, shardings[path])):
            for place in places(box[:num_leading]):
                matrix = parameter.read_box((*(slice(i, i + 1) for i in place), *box[num_leading:]))
                if number == 0:
                    bytes_a_device += sum(array.nbytes for array in jax.tree.leaves(matrix))
    files.check_unchanged()
    return findings, bytes_a_device


def _scan(files: CheckpointFiles, manifest: Manifest, progress: Progress | None) -> tuple[Findings, None]:
    """Every tensor, whatever would hold it."""
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
    return findings, None
