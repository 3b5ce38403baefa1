"""A parameter tree to a checkpoint directory, in any of the three layouts.

The dtype of a tensor on disk is the one it was read with, if a record says so, that dtype is not
wider than the one in memory and holds every value exactly; otherwise the one in memory. Quantised
weights are written as they are held. Loading a checkpoint with native weights and saving it again
therefore gives the same bytes for every tensor. Hash tables are always I64. The transformers layouts
get quantised weights dequantised: they have no FP4.

Parameters may be spread over devices. Host memory holds one tensor of them at a time, or a few while one is
rounded. Where other processes have a part of them, every process must save, with the same arguments, to one
folder that all hosts share; each writes its own files (`write_together`).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from dsv4_jax import parameters as table
from dsv4_jax.boxes import PIECE_ELEMENTS
from dsv4_jax.checkpoint import names, storage
from dsv4_jax.checkpoint.files import Progress
from dsv4_jax.checkpoint.held import Held, Leaf, Pair, Pairs, as_dtype, in_memory, plain_tensor
from dsv4_jax.checkpoint.read import NAN_CODES, bad_scales, num_nan, num_non_finite
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.shares import Shares, is_spread, shares
from dsv4_jax.checkpoint.side_files import GENERATION_FILE, SIDE_FILES
from dsv4_jax.checkpoint.storage import FP4_DTYPES, Release, ReleasedTensor
from dsv4_jax.checkpoint.write import Planned, TensorPlan, write_sharded
from dsv4_jax.checkpoint.write_together import write_together
from dsv4_jax.config import ModelConfig
from dsv4_jax.config.io import CONFIG_FILE, official_config_dict, token_json, transformers_config_dict
from dsv4_jax.errors import CheckpointError, ProblemsError
from pallas_kernels.formats.blocks import Fp8Blocks
from pallas_kernels.formats.weights import QuantizedWeight
from sharding.agreement import collected

MAX_SHARD_BYTES = 5_000_000_000

Keeps = Callable[[Held, names.TensorSpec, str], bool]
"""Whether a dtype holds every value of a tensor of a parameter."""

_NAME_OF_DTYPE = {DTYPES[name]: name for name in ("BF16", "F32")}


def save_checkpoint(
    directory: str | pathlib.Path,
    config: ModelConfig,
    parameters: Mapping[str | int, object],
    *,
    layout: names.Layout = "official",
    stored: Mapping[str, str] | None = None,
    side_files: Mapping[str, bytes] | None = None,
    more_files: Mapping[str, bytes] | None = None,
    release: Release | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Writes `config.json`, sharded safetensors with their index, and tokenizer files, atomically.

    Args:
        directory: new, or empty, or (with `overwrite`) a checkpoint to replace.
        config: of the model.
        parameters: the tree of the table (`dsv4_jax.parameters`): nested dicts of arrays, on one device,
            split over several, or in host memory.
        layout: naming; 'transformers' is its native one, which its `from_pretrained` loads.
        stored: `Loaded.stored`, the dtypes to keep where that loses nothing.
        side_files: `Loaded.side_files`, the small files to write beside, by name; a
            generation_config.json is made of the config if it is not among them.
        more_files: further files by name, such as the record of a training, that appear with the rest.
        release: the formats to store weights in, rounding those that are held otherwise; None keeps
            each as it is held. Official layout only.
        max_shard_bytes: data bytes of a shard at most, unless one tensor is larger.
        overwrite: replace what is there.
        progress: called after each tensor with (its name, bytes written, bytes of all tensors).

    Returns:
        Warnings: what the layout cannot hold.

    Raises:
        CheckpointError: parameters that are not those of the config, or that hold NaN or infinity (what
            `load` or `verify` would refuse does not replace a sound checkpoint); an unknown layout; a
            directory that must not be written. Nothing is changed then.
    """
    flat = flattened(parameters)
    problems = option_problems(config, layout, release)
    problems += [
        f"side file {name!r} must be one of {SIDE_FILES}"
        for name in side_files or ()
        if name not in SIDE_FILES
    ]
    problems += parameter_problems(config, flat)
    held = {path: in_memory(leaf) for path, leaf in flat.items()}
    written = checked = None
    if not problems and is_spread(flat):
        checked = shares(flat, names.official_tensors(config))
        written = shares(flat, names.layout_tensors(_of_layout(config, layout), layout))
    problems = problems or non_finite_problems(config, held, checked and checked.names_to_read())
    if checked is not None:
        problems = sorted({problem for each in collected(problems) for problem in each})
    if problems:
        raise CheckpointError(f"cannot save to {directory}", problems)
    return write_held(
        directory,
        config,
        held,
        layout=layout,
        stored=stored or {},
        side_files=side_files or {},
        more_files=more_files or {},
        release=release,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
        written=written,
    )


def _of_layout(config: ModelConfig, layout: names.Layout) -> ModelConfig:
    """The config of what a layout can hold: all but the official one have no draft heads."""
    none = {"num_nextn_predict_layers": 0, "dspark": None}
    return config if layout == "official" else dataclasses.replace(config, **none)


def option_problems(config: ModelConfig, layout: names.Layout, release: Release | None) -> list[str]:
    """What is wrong with a layout and with formats to store weights in."""
    problems = [] if layout in names.LAYOUTS else [f"layout={layout!r} must be one of {names.LAYOUTS}"]
    if release is not None:
        if layout != "official":
            problems.append(f"layout={layout!r} cannot hold {release.experts} weights, only 'official' can")
        problems += storage.quantizing_problems(names.official_tensors(config), release)
    return problems


def write_held(
    directory: str | pathlib.Path,
    config: ModelConfig,
    held: Mapping[names.Path, Held],
    *,
    layout: names.Layout,
    stored: Mapping[str, str],
    side_files: Mapping[str, bytes],
    more_files: Mapping[str, bytes],
    release: Release | None,
    max_shard_bytes: int,
    overwrite: bool,
    progress: Progress | None,
    last_check: Callable[[], None] | None = None,
    written: Shares | None = None,
) -> list[str]:
    """As `save_checkpoint`, for parameters that may lie in files, and in which no problem was found.

    Args:
        held: every parameter of the config; each tensor is read as it is written, some also before.
        last_check: called when all is written and nothing has appeared yet; what it raises stops that.
        written: which process writes what; None: this one all of it.
    """
    warnings = []
    if layout != "official" and (config.num_nextn_predict_layers or config.dspark):
        what = "MTP block" if config.dspark is None else "DSpark draft head"
        warnings.append(f"the {what} is not saved: the {layout} layout has none")
        config = _of_layout(config, layout)
    formats = sorted({parameter.format for parameter in held.values()} - {"plain"})
    if layout != "official" and formats:
        warnings.append(f"{' and '.join(formats)} weights are saved dequantised in the {layout} layout")
    plan = functools.partial(planned_tensors, config, held, layout, stored, release)
    if written is None:
        planned = list(plan())
    else:
        pairs = Pairs(remembering=False)
        planned = list(plan(keeps=_agreed(functools.partial(plan, pairs=pairs), written), pairs=pairs))
    dtypes = {plan.dtype for _, plan, _ in planned}
    small = extra_files(config, layout, _name_of(held["embed",]), dtypes, side_files)
    write = write_sharded if written is None else functools.partial(write_together, shares=written)
    write(
        pathlib.Path(directory),
        planned,
        max_shard_bytes=max_shard_bytes,
        extra_files=small | dict(more_files),
        overwrite=overwrite,
        progress=progress,
        last_check=last_check,
    )
    return warnings


def flattened(parameters: Mapping[str | int, object]) -> dict[names.Path, Leaf]:
    """Path -> array or quantised weight of a nested dict."""
    flat: dict[names.Path, Leaf] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= {(key, *path): leaf for path, leaf in flattened(value).items()}
        else:
            flat[(key,)] = value  # type: ignore[assignment]
    return flat


def parameter_problems(config: ModelConfig, flat: Mapping[names.Path, Leaf]) -> list[str]:
    """Where a flat parameter tree is not that of the config."""
    expected = table.parameters(config)
    problems = [f"{_joined(path)} is missing" for path in expected if path not in flat]
    for path, leaf in flat.items():
        if path not in expected:
            problems.append(f"{_joined(path)} is no parameter of this config")
            continue
        spec = expected[path]
        if tuple(leaf.shape) != spec.shape:
            problems.append(f"{_joined(path)}: shape {tuple(leaf.shape)}, expected {spec.shape}")
        if isinstance(leaf, QuantizedWeight):
            continue
        dtype = np.dtype(leaf.dtype)
        known = [dtype] if dtype in _NAME_OF_DTYPE else list(_NAME_OF_DTYPE)
        if dtype not in {spec.dtype(d) for d in known}:
            wanted = " or ".join(sorted({spec.dtype(d).name for d in _NAME_OF_DTYPE}))
            problems.append(f"{_joined(path)}: dtype {dtype.name}, expected {wanted}")
    return problems


def non_finite_problems(
    config: ModelConfig, held: Mapping[names.Path, Held], look_at: Collection[str] | None = None
) -> list[str]:
    """Parameters that hold numbers which reading would refuse, or that cannot be read, one line each; of the
    official tensors with these names only, if `look_at` is given."""
    specs: dict[names.Path, list[names.TensorSpec]] = {}
    for spec in names.official_tensors(config):
        specs.setdefault(spec.path, []).append(spec)
    problems = []
    for path, parameter in held.items():
        own = [spec for spec in specs[path] if look_at is None or spec.name in look_at]
        try:
            problem = _non_finite(parameter, sorted(own, key=lambda spec: spec.index))
        except ProblemsError as unreadable:
            problem = ", ".join(unreadable.problems)
        if problem is not None:
            problems.append(f"{_joined(path)}: {problem}")
    return problems


def _non_finite(held: Held, specs: list[names.TensorSpec]) -> str | None:
    """What is wrong with the numbers of a parameter, of all its tensors together."""
    bad = size = bad_scale = num_scales = 0
    what, what_scales = "values are NaN or infinite", ""
    for tensor in map(held.tensor, specs):
        if isinstance(tensor, np.ndarray):
            values = tensor.reshape(-1)
            starts = range(0, values.size, PIECE_ELEMENTS) if values.dtype in _NAME_OF_DTYPE else ()
            bad += sum(num_non_finite(values[start : start + PIECE_ELEMENTS]) for start in starts)
            size += values.size
            continue
        number, what_scales = bad_scales(tensor.scale)
        bad_scale += number
        num_scales += tensor.scale.size
        if isinstance(tensor, Fp8Blocks):
            bad += num_nan(tensor.elements)
            size += tensor.elements.size
            what = NAN_CODES
    if bad_scale:
        return f"{bad_scale} of {num_scales} {what_scales}"
    return f"{bad} of {size} {what}" if bad else None


def _joined(path: names.Path) -> str:
    return "/".join(map(str, path))


def planned_tensors(
    config: ModelConfig,
    held: Mapping[names.Path, Held],
    layout: names.Layout,
    stored: Mapping[str, str],
    release: Release | None,
    *,
    keeps: Keeps | None = None,
    pairs: Pairs | None = None,
) -> Iterator[Planned]:
    """Name, dtype and shape of every tensor of the file, and a function that gives its data.

    Args:
        config, held, layout, stored, release: as in `write_held`.
        keeps: in place of `keeps_values`.
        pairs: what gives quantised tensors.
    """
    records = _records(config, stored)
    pairs, keeps = pairs or Pairs(), keeps or keeps_values
    for spec in names.layout_tensors(config, layout):
        parameter = held[spec.path]
        how = "plain" if layout != "official" else parameter.format
        if release is not None:
            how = storage.format_in(release, spec)
        if how != "plain":
            give = functools.partial(pairs, parameter, spec, how)
            yield from _planned_pair(storage.stored_pair(spec, how), give, stored)
            continue
        dtype = "I64"
        if parameter.format != "plain":
            dtype = _name_of(held["embed",])
        elif spec.kind != "table":
            dtype = _name_of(parameter)
            recorded = records.get((spec.path, spec.index))
            if recorded not in (None, dtype) and keeps(parameter, spec, recorded):
                dtype = recorded
        give = functools.partial(plain_tensor, parameter, spec, DTYPES[dtype])
        yield spec.name, TensorPlan(dtype, spec.shape), give


def _name_of(plain: Held) -> str:
    """Safetensors name of the dtype that a parameter has in memory."""
    assert plain.dtype is not None
    return _NAME_OF_DTYPE[plain.dtype]


def _agreed(plan: Callable[..., Iterator[Planned]], written: Shares) -> Keeps:
    """What every process finds of the tensors that it writes, known to all: they must plan alike."""
    read, kept = written.names_to_read(), set()

    def found(held: Held, spec: names.TensorSpec, dtype: str) -> bool:
        if spec.name in read and keeps_values(held, spec, dtype):  # torn ones are read by all
            kept.add(spec.name)
        return False

    for _ in plan(keeps=found):
        pass
    everywhere = {name for each in collected(sorted(kept)) for name in each}
    return lambda held, spec, dtype: spec.name in everywhere


def _planned_pair(
    tensors: tuple[ReleasedTensor, ReleasedTensor],
    give: Callable[[], Pair],
    stored: Mapping[str, str],
) -> Iterator[Planned]:
    """Elements and scales, in the dtypes they were read with."""

    def data(part: int, dtype: str) -> np.ndarray:
        return as_dtype(give()[part], dtype)

    for part, tensor in enumerate(tensors):
        dtype = storage.dtype_on_disk(tensor, stored.get(tensor.name))
        yield tensor.name, TensorPlan(dtype, tensor.shape), functools.partial(data, part, dtype)


def _records(config: ModelConfig, stored: Mapping[str, str]) -> dict[tuple[names.Path, tuple[int, ...]], str]:
    """Recorded dtype by place; a stacked tensor has one only if all its parts agree."""
    found: dict[tuple[names.Path, tuple[int, ...]], set[str | None]] = {}
    for spec in names.official_tensors(config):
        for depth in range(len(spec.index) + 1):
            found.setdefault((spec.path, spec.index[:depth]), set()).add(stored.get(spec.name))
    single = {place: next(iter(dtypes)) for place, dtypes in found.items() if len(dtypes) == 1}
    return {place: dtype for place, dtype in single.items() if dtype is not None}


def keeps_values(held: Held, spec: names.TensorSpec, dtype: str) -> bool:
    """Whether the recorded dtype is narrower than the one in memory and holds every value."""
    narrow = DTYPES[dtype]
    assert held.dtype is not None
    if narrow.itemsize >= held.dtype.itemsize:
        return False
    values = held.tensor(spec)
    assert isinstance(values, np.ndarray)
    flat = values.reshape(-1)
    for start in range(0, flat.size, PIECE_ELEMENTS):
        piece = flat[start : start + PIECE_ELEMENTS]
        with np.errstate(over="ignore", invalid="ignore"):
            back = piece.astype(narrow).astype(piece.dtype)
        if back.tobytes() != piece.tobytes():  # bytes: 0 and -0 differ
            return False
    return True


def extra_files(
    config: ModelConfig,
    layout: names.Layout,
    param_dtype: str,
    dtypes: Collection[str],
    side_files: Mapping[str, bytes],
) -> dict[str, bytes]:
    """The small files of a checkpoint directory, by name."""
    dtype = {"BF16": "bfloat16", "F32": "float32"}[param_dtype]
    if layout == "official":
        fields = official_config_dict(config) | {"torch_dtype": dtype}
        if not {"F8_E4M3", *FP4_DTYPES}.isdisjoint(dtypes):
            fields["quantization_config"] = storage.QUANTIZATION_CONFIG
        if not set(FP4_DTYPES).isdisjoint(dtypes):
            fields["expert_dtype"] = "fp4"
    else:
        fields = transformers_config_dict(config) | {"dtype": dtype}
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": token_json(config.eos_token_id)}
    return {CONFIG_FILE: _json(fields), GENERATION_FILE: _json(generation)} | dict(side_files)


def _json(fields: Mapping[str, object]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
