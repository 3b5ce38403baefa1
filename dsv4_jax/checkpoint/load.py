"""A checkpoint directory to a parameter tree, tensor by tensor.

Each parameter is one buffer, filled in place and handed to JAX. On a CPU JAX uses such a 64-byte
aligned buffer as it is (`device_put` copies nothing), so the peak is the weights and the tensor
being read; on an accelerator it is the largest parameter. Mapped pages are given back after each
tensor.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np

from dsv4_jax.checkpoint import names, native
from dsv4_jax.checkpoint.files import CheckpointFiles
from dsv4_jax.checkpoint.manifest import Manifest, Options, open_manifest
from dsv4_jax.checkpoint.release import DraftHead
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.side_files import UseTokenizer
from dsv4_jax.checkpoint.tensor_rules import Entry
from dsv4_jax.checkpoint.values import Findings, place_in, read_entry
from dsv4_jax.checkpoint.write import Progress
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics.weights import QuantizedWeight

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dsv4_jax.numerics.policy import Policy

ALIGNMENT = 64
"""Bytes; JAX on a CPU takes over host buffers so aligned instead of copying them."""

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
    place: Callable[[np.ndarray, names.Path], object] | None = None,
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
        allow_links: a folder that links may lead into (see `dsv4_jax.folder`).
        tokenizer: 'ignore' opens no tokenizer.json and no tokenizer_config.json.
        place: host array and parameter path -> the array to keep; by default `jax.device_put`. Called
            for the elements and for the scales of a quantised weight.
        progress: called after each tensor with (its name, bytes read, bytes of all tensors).

    Raises:
        CheckpointError: with all problems at once; nothing is loaded then.
    """
    options = Options(draft_head, text_only, require_mtp, copy, allow_links, tokenizer)
    with open_manifest(directory, options) as (files, manifest):
        findings = Findings()
        flat: dict[names.Path, object] = {}
        param_dtype = exact_dtype(manifest) if policy is None else policy.param_dtype
        for path, value in read_parameters(
            files, manifest, param_dtype, findings, scan_weights, progress, weights
        ):
            if findings.problems:
                flat.clear()  # reading goes on only to report everything
            elif place is None:
                flat[path] = jax.device_put(value)
            else:
                flat[path] = jax.tree.map(lambda array, path=path: place(array, path), value)
        files.check_unchanged()
    if findings.problems:
        raise CheckpointError(f"checkpoint {directory} cannot be used", findings.problems)
    return Loaded(
        config=manifest.config,
        parameters=nested(flat),
        stored=stored_dtypes(manifest, flat),
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


def read_parameters(
    files: CheckpointFiles,
    manifest: Manifest,
    param_dtype: np.dtype,
    findings: Findings,
    scan_weights: bool,
    progress: Progress | None = None,
    weights: Weights = "dequantized",
) -> Iterator[tuple[names.Path, np.ndarray | QuantizedWeight]]:
    """Every parameter in aligned host arrays, one after the other; problems go to `findings`."""
    groups: dict[names.Path, list[Entry]] = {}
    for entry in manifest.entries:
        groups.setdefault(entry.spec.path, []).append(entry)
    total = sum(_num_bytes(entry) for entry in manifest.entries)
    done = 0

    def finish(entry: Entry) -> None:
        nonlocal done
        for tensor in (entry.tensor, entry.scale):
            if tensor is not None:
                files.drop_pages(tensor.name)
        done += _num_bytes(entry)
        if progress is not None:
            progress(entry.tensor.name, done, total)

    for path, entries in groups.items():
        parameter = entries[0].spec.parameter
        if weights == "native" and any(entry.format != "plain" for entry in entries):
            what = parameter, entries, files.read
            if native.can_stay(*what):
                yield path, native.read_native(*what, findings, aligned, finish)
                continue
            findings.dequantized.append("/".join(map(str, path)))
        array = aligned(parameter.shape, parameter.dtype(param_dtype))
        for entry in entries:
            read_entry(
                entry,
                files.read,
                place_in(array, entry.spec),
                findings,
                num_experts=manifest.config.n_routed_experts,
                scan_weights=scan_weights,
            )
            finish(entry)
        yield path, array


def _num_bytes(entry: Entry) -> int:
    return entry.tensor.num_bytes + (entry.scale.num_bytes if entry.scale is not None else 0)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array that starts at a multiple of `ALIGNMENT` bytes."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def nested(flat: Mapping[names.Path, object]) -> Parameters:
    """{("mtp", 0, "norm"): x} to {"mtp": {0: {"norm": x}}}."""
    tree: Parameters = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})  # type: ignore[assignment]
        node[path[-1]] = value
    return tree


def stored_dtypes(manifest: Manifest, flat: Mapping[names.Path, object]) -> dict[str, str]:
    """Official name -> dtype on disk of tensors that were not dequantised, and of the scales among them.

    A stacked tensor speaks for its parts.
    """
    by_place: dict[tuple[names.Path, tuple[int, ...]], Entry] = {
        (entry.spec.path, entry.spec.index): entry
        for entry in manifest.entries
        if entry.format == "plain" or isinstance(flat.get(entry.spec.path), QuantizedWeight)
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
