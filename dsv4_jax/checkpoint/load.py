"""A checkpoint directory to a parameter tree, box by box.

A box is what one device holds of a parameter: a buffer, filled in place from the tensors that it touches and
handed to JAX. On a CPU JAX uses such a 64-byte aligned buffer as it is (`device_put` copies nothing), so the
peak is the weights and the tensor being read; on an accelerator it is the largest box.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from jax.sharding import Mesh

from dsv4_jax import parameters as table
from dsv4_jax.checkpoint import names
from dsv4_jax.checkpoint.expected import StoredTensor
from dsv4_jax.checkpoint.files import Progress
from dsv4_jax.checkpoint.held import BLOCK, Held
from dsv4_jax.checkpoint.manifest import Manifest, Options, open_manifest
from dsv4_jax.checkpoint.read import Findings, stored_parameters
from dsv4_jax.checkpoint.recognise import DraftHead
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.side_files import UseTokenizer
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import CheckpointError
from dsv4_jax.parameter_shardings import parameter_shardings
from pallas_kernels.formats.weights import QuantizedWeight
from sharding.placement import placed
from sharding.rules import Rules

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dsv4_jax.numerics.policy import Policy

Weights = Literal["native", "dequantized"]
"""What becomes of quantised weights: kept as they are, or made arrays of the param dtype."""


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
    parameters: table.Parameters
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
    draft_head: DraftHead = "load",
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
        draft_head: 'ignore' loads a DSpark release without its draft head.
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
        shardings = parameter_shardings(manifest.config, mesh, rules, str(directory), blocks_of(held))
        for path, parameter in held.items():
            value = placed(parameter.read_box, parameter.shape, shardings.get(path))
            if findings.problems:
                flat.clear()  # reading goes on only to report everything
            elif parameter.format == "plain":
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
            tensor.format == "fp4" for tensor in manifest.tensors if tensor.spec.parameter.role == "expert"
        ),
    )


def blocks_of(held: Mapping[names.Path, Held]) -> dict[names.Path, tuple[int, int]]:
    """Rows and columns that share a scale, of the parameters that are held quantised."""
    return {path: BLOCK[each.format] for path, each in held.items() if each.format in BLOCK}


def exact_dtype(manifest: Manifest) -> np.dtype:
    """The narrower of bfloat16 and float32 that holds every matrix of a checkpoint exactly."""
    plain = {
        tensor.info.dtype
        for tensor in manifest.tensors
        if tensor.format == "plain" and tensor.spec.kind == "matrix"
    }
    return DTYPES["BF16" if plain <= {"BF16"} else "F32"]


def nested(flat: Mapping[names.Path, object]) -> table.Parameters:
    """{("mtp", 0, "norm"): x} to {"mtp": {0: {"norm": x}}}."""
    tree: table.Parameters = {}
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
    by_place: dict[tuple[names.Path, tuple[int, ...]], StoredTensor] = {
        (tensor.spec.path, tensor.spec.index): tensor
        for tensor in manifest.tensors
        if tensor.format == "plain" or held[tensor.spec.path].format != "plain"
    }
    stored = {}
    for spec in names.official_tensors(manifest.config):
        for depth in range(len(spec.index), -1, -1):
            tensor = by_place.get((spec.path, spec.index[:depth]))
            if tensor is not None:
                stored[spec.name] = tensor.info.dtype
                if tensor.scale is not None and spec.scale_name is not None:
                    stored[spec.scale_name] = tensor.scale.dtype
                break
    return stored
