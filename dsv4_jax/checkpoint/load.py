"""A checkpoint directory to a parameter tree, box by box.

A box is what one device holds of a parameter: a buffer, filled in place from the tensors that it touches and
handed to JAX. On a CPU JAX uses such a 64-byte aligned buffer as it is (`device_put` copies nothing), so the
peak is the weights and the tensor being read; on an accelerator it is the largest box.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsv4_jax import parameters as table
from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.held import BLOCK, Held
from dsv4_jax.checkpoint.manifest import Manifest, Options, open_manifest
from dsv4_jax.checkpoint.read import stored_parameters
from dsv4_jax.checkpoint.release import DraftHead
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.side_files import UseTokenizer
from dsv4_jax.checkpoint.tensor_rules import Entry
from dsv4_jax.checkpoint.values import Findings
from dsv4_jax.checkpoint.write import Progress
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import CheckpointError, ProblemsError
from pallas_kernels.formats.weights import QuantizedWeight
from sharding.placement import Axis, Rules, placed, rule_problems, sharding_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dsv4_jax.numerics.policy import Policy

Weights = Literal["native", "dequantized"]
"""What becomes of quantised weights: kept as they are, or made arrays of the param dtype."""

Parameters = dict[str | int, object]
"""Nested dict of arrays and quantised weights; list positions are int keys, as in `nnx.to_pure_dict`."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        config: of the model; without MTP block where the checkpoint has none.
        parameters: the parameter tree, see `dsv4_jax.parameters`.
        stored: official tensor name -> safetensors dtype, of every tensor that was not dequantised;
            `save` uses it to write back what was read.
        warnings: sentences for the user.
        layout: the naming that was found.
        tokenizer: of `tokenizer.json`, if there is one.
        side_files: the small files beside the weights, by name; `save` writes them back.
        experts_in_fp4: whether every routed expert came from FP4, so that its values are on that grid.
    """

    config: ModelConfig
    parameters: Parameters
    stored: Mapping[str, str]
    warnings: tuple[str, ...]
    layout: names.Layout
    tokenizer: "Tokenizer | None"
    side_files: Mapping[str, bytes]
    experts_in_fp4: bool


def load_checkpoint(
    directory: str | pathlib.Path,
    policy: "Policy | None",
    *,
    weights: Weights = "dequantized",
    draft_head: DraftHead = "refuse",
    text_only: bool = False,
    require_mtp: bool = False,
    scan_weights: bool = False,
    copy: bool = False,
    allow_links: str | pathlib.Path | None = None,
    tokenizer: UseTokenizer = "read",
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Loads a checkpoint in any layout.

    Config, index, headers, names, shapes, dtypes and side files are checked in full before any data is read.
    Scales, hash tables and float32 tensors are scanned while reading. Nothing from the directory is
    executed.

    Args:
        directory: with `config.json` and safetensors files.
        policy: gives the dtype of matrices; norms, sinks, mHC, biases and position biases are
            float32. None takes the narrower of bfloat16 and float32 that holds every matrix exactly.
        weights: 'native' keeps FP8 and FP4 weights as `QuantizedWeight`; 'dequantized' makes them arrays of
            the param dtype.
        draft_head: 'ignore' loads a DSpark release without its draft head; 'refuse' does not load
            it.
        text_only: load the text model of a vision variant.
        require_mtp: refuse a checkpoint without an MTP block.
        scan_weights: look for NaN and infinity in bfloat16 weights too.
        copy: read files instead of mapping them (see `open_checkpoint`).
        allow_links: a folder that links may lead into (see `dsv4_jax.reading.folder`).
        tokenizer: 'ignore' opens no tokenizer.json and no tokenizer_config.json.
        mesh: devices to place the parameters on; None: the default device.
        rules: letter of a dim (`dsv4_jax.parameters`) -> axes of the mesh that it is split over, see
            `sharding.placement`; dims without a rule are whole on every device.
        progress: called after each tensor with (its name, bytes read, bytes of all tensors).

    Raises:
        CheckpointError: with all problems at once; nothing is loaded then.
        ProblemsError: rules that do not fit the mesh or the parameters, all at once, before data is read.
    """
    options = Options(draft_head, text_only, require_mtp, copy, allow_links, tokenizer)
    with open_manifest(directory, options) as (files, manifest):
        findings = Findings()
        flat: dict[names.Path, object] = {}
        param_dtype = exact_dtype(manifest) if policy is None else policy.param_dtype
        held = stored_parameters(
            files,
            manifest,
            param_dtype,
            findings,
            keep_quantized=weights == "native",
            scan_weights=scan_weights,
            progress=progress,
        )
        shardings = _shardings(directory, manifest.config, held, mesh, rules or {})
        for path, parameter in held.items():
            value = placed(parameter.read_box, parameter.shape, shardings.get(path))
            if findings.problems:
                flat.clear()  # reading goes on only to report everything
            elif parameter.format == "bf16":
                flat[path] = value
            else:
                flat[path] = QuantizedWeight(value, table.parameters(manifest.config)[path].own)
        files.check_unchanged()
    if findings.problems:
        raise CheckpointError(f"checkpoint {directory} cannot be used", findings.problems)
    return Loaded(
        config=manifest.config,
        parameters=nested(flat),
        stored=stored_dtypes(manifest, held),
        warnings=(*manifest.warnings, *findings.warnings()),
        layout=manifest.layout,
        tokenizer=manifest.side_files.tokenizer,
        side_files=manifest.side_files.contents,
        experts_in_fp4=all(
            entry.format == "fp4" for entry in manifest.entries if entry.spec.parameter.role == "expert"
        ),
    )


def exact_dtype(manifest: Manifest) -> np.dtype:
    """The narrower of bfloat16 and float32 that holds every matrix of a checkpoint exactly."""
    plain = {
        entry.tensor.dtype
        for entry in manifest.entries
        if entry.format == "plain" and entry.spec.kind == "matrix"
    }
    return DTYPES["BF16" if plain <= {"BF16"} else "F32"]


def _shardings(
    directory: str | pathlib.Path,
    config: ModelConfig,
    held: Mapping[names.Path, Held],
    mesh: Mesh | None,
    rules: Rules,
) -> dict[names.Path, NamedSharding]:
    """Where each parameter goes; nothing without a mesh."""
    if mesh is None:
        problems = ["rules are given, but no mesh"] if rules else []
        mesh_problems, found = problems, {}
    else:
        mesh_problems, found = rule_problems(mesh, rules, table.LETTERS), {}
        for path, parameter in table.parameters(config).items():
            axes = placed_axes(parameter, BLOCK.get(held[path].format))
            name = "/".join(map(str, path))
            found[path], more = sharding_of(name, axes, mesh, rules)
            mesh_problems += more
    if mesh_problems:
        raise ProblemsError(f"cannot place the parameters of {directory}", mesh_problems)
    return found


def placed_axes(parameter: table.Parameter, block: tuple[int, int] | None) -> list[Axis]:
    """The axes of a parameter's array; with the block of a quantised weight those of its [*leading, O, I]."""
    dims, shape = parameter.dims, parameter.shape
    if block is None:
        return [Axis((letter,), (size,)) for letter, size in zip(dims, shape, strict=True)]
    axes = placed_axes(parameter, None)[: parameter.num_leading]
    ends = list(itertools.accumulate(parameter.folds, initial=parameter.num_leading))
    folds = list(itertools.pairwise(ends))
    return axes + [Axis(dims[a:b], shape[a:b], n) for (a, b), n in zip(folds, block, strict=True)]


def nested(flat: Mapping[names.Path, object]) -> Parameters:
    """{("mtp", 0, "norm"): x} to {"mtp": {0: {"norm": x}}}."""
    tree: Parameters = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})  # type: ignore[assignment]
        node[path[-1]] = value
    return tree


def stored_dtypes(manifest: Manifest, held: Mapping[names.Path, Held]) -> dict[str, str]:
    """Official name -> dtype on disk of tensors that were not dequantised, and of the scales among them.

    A stacked tensor speaks for its parts.
    """
    by_place: dict[tuple[names.Path, tuple[int, ...]], Entry] = {
        (entry.spec.path, entry.spec.index): entry
        for entry in manifest.entries
        if entry.format == "plain" or held[entry.spec.path].format != "bf16"
    }
    stored = {}
    for spec in names.official_tensors(manifest.config):
        for depth in range(len(spec.index), -1, -1):
            entry = by_place.get((spec.path, spec.index[:depth]))
            if entry is not None:
                stored[spec.name] = entry.tensor.dtype
                if entry.scale is not None and spec.scale_name is not None:
                    stored[spec.scale_name] = entry.scale.dtype
                break
    return stored
