"""What the headers must hold for a config: which tensors, their dtypes and shapes, the scales beside them.

Tensors that are missing or should not be there are reported in the model's words, one line a layer.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from dsv4_jax.checkpoint.names import LAYER_PREFIX, Layout, TensorSpec
from dsv4_jax.checkpoint.recognise import row_of
from dsv4_jax.checkpoint.safetensors import TensorInfo
from dsv4_jax.checkpoint.storage import FP4_DTYPES, SCALE_DTYPES, Format
from dsv4_jax.config import DSPARK_STAGES, ModelConfig
from dsv4_jax.reading.foreign import OFFICIAL_HOME
from pallas_kernels.formats.on_host import fp4_packed_shape, fp4_scale_shape, fp8_scale_shape
from pallas_kernels.formats.sizes import FP4_GROUP

PLAIN_DTYPES = ("BF16", "F16", "F32")
TABLE_DTYPES = ("I64", "I32")


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor to read: where it goes, where it lies, how it is stored."""

    spec: TensorSpec
    info: TensorInfo
    scale: TensorInfo | None
    format: Format


def check_tensor(
    spec: TensorSpec, tensor: TensorInfo, scale: TensorInfo | None
) -> tuple[StoredTensor | None, list[str]]:
    """Matches a tensor with its specification.

    Storage is decided by the tensor's dtype, never by the config or the repository's name.

    Args:
        spec: what the config asks for.
        tensor: what the header says.
        scale: the header entry of `spec.scale_name`, if present.

    Returns:
        (what to read, problems); the first is None if there are problems.
    """
    where = f"{tensor.path.name}: {tensor.name}"
    problems: list[str] = []
    how: Format = "plain"
    if spec.kind == "table":
        if tensor.dtype not in TABLE_DTYPES:
            problems.append(f"{where}: dtype {tensor.dtype}, expected I64 or I32")
        expected = spec.shape
    elif tensor.dtype in PLAIN_DTYPES:
        expected = spec.shape
    elif spec.scale_name is None:
        problems.append(f"{where}: dtype {tensor.dtype}, expected BF16, F16 or F32")
        expected = spec.shape
    elif tensor.dtype == "F8_E4M3":
        how, expected = "fp8", spec.shape
    elif tensor.dtype in FP4_DTYPES:
        how, expected = "fp4", fp4_packed_shape(spec.shape)
        if tensor.shape == spec.shape:
            problems.append(
                f"{where}: {tensor.dtype} {list(tensor.shape)} is int8, not packed FP4 (which would"
                f" be {list(expected)}); int8 quantisation is not supported; {OFFICIAL_HOME}"
            )
            expected = spec.shape
        elif spec.shape[-1] % FP4_GROUP:
            problems.append(f"{where}: FP4 needs rows of a multiple of {FP4_GROUP}, not {spec.shape[-1]}")
    else:
        problems.append(f"{where}: dtype {tensor.dtype}, expected BF16, F16, F32, F8_E4M3, or I8 (FP4)")
        expected = spec.shape
    if tensor.shape != expected:
        problems.append(
            f"{where}: shape {list(tensor.shape)}, expected {list(expected)}"
            f"{_transposed_hint(tensor.shape, expected)}"
        )
    if not problems:
        problems = _scale_problems(spec, tensor, scale, how)
    return (None if problems else StoredTensor(spec, tensor, scale, how)), problems


def _transposed_hint(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    swapped = (*expected[:-2], *expected[:-3:-1])
    return " (it looks transposed)" if len(expected) > 1 and found == swapped else ""


def _scale_problems(spec: TensorSpec, tensor: TensorInfo, scale: TensorInfo | None, how: Format) -> list[str]:
    where = f"{tensor.path.name}: {tensor.name}"
    if how == "plain":
        if scale is None:
            return []
        return [f"{scale.path.name}: {scale.name}: scales beside {tensor.dtype} weights, without use"]
    if scale is None:
        return [f"{where}: {how.upper()} weights without their scales ({spec.scale_name} is missing)"]
    problems = []
    if scale.dtype not in SCALE_DTYPES:
        problems.append(f"{scale.path.name}: {scale.name}: dtype {scale.dtype}, expected F8_E8M0 or F32")
    grid = fp8_scale_shape(spec.shape) if how == "fp8" else fp4_scale_shape(spec.shape)
    if scale.shape != grid:
        problems.append(
            f"{scale.path.name}: {scale.name}: shape {list(scale.shape)}, expected {list(grid)}"
            f"{_grid_hint(spec.shape, scale.shape)}"
        )
    return problems


def _grid_hint(shape: tuple[int, ...], found: tuple[int, ...]) -> str:
    known: Mapping[str, tuple[int, ...]] = {
        "32 x 32 blocks (DeepSeek-V4.1?)": (*shape[:-2], -(-shape[-2] // 32), -(-shape[-1] // 32)),
        "128 x 128 blocks": fp8_scale_shape(shape),
        "1 x 32 groups": (*shape[:-1], -(-shape[-1] // 32)),
        "1 x 16 groups (NVFP4?)": (*shape[:-1], -(-shape[-1] // 16)),
        "one scale a row": (*shape[:-1], 1),
    }
    fitting = [name for name, grid in known.items() if grid == found]
    return f": it looks like {fitting[0]}" if fitting else ""


_ONLY = {
    "compressed": "only compressed layers have a compressor",
    "csa": "only layers of ratio 4 (CSA) have an indexer",
    "hash": "only hash-routed layers have a tid2eid table",
    "learned": "a hash-routed layer has no selection bias",
}


def missing_problems(expected: Iterable[TensorSpec], found: Mapping[str, object]) -> list[str]:
    """One line a missing tensor; missing experts of a layer, and whole layers, take one line.

    Args:
        expected: every tensor of the config, in its layout.
        found: keys are the names that are present.
    """
    layers: dict[str, list[TensorSpec]] = {}
    is_dspark = False
    for spec in expected:
        layers.setdefault(_layer_prefix(spec.name), []).append(spec)
        is_dspark = is_dspark or spec.path[0] == "dspark"
    problems = []
    for prefix, specs in layers.items():
        missing = [spec.name for spec in specs if spec.name not in found]
        if len(missing) == len(specs) > 1 and prefix:
            problem = f"all {len(missing)} tensors of {prefix}* are missing"
            if prefix == "mtp.0." and not is_dspark:
                problem += "; num_nextn_predict_layers: 0 loads the model without its MTP block"
            elif prefix.startswith("mtp."):
                problem += "; draft_head='ignore' loads the model without its DSpark head"
            problems.append(problem)
            continue
        holes: dict[str, list[int]] = {}
        for name in missing:
            head, experts, tail = name.partition(".experts.")
            number = tail.partition(".")[0]
            if experts and number.isdecimal():
                holes.setdefault(head + experts, []).append(int(number))
            else:
                tied = " (V4 ties no embeddings)" if name in ("head.weight", "lm_head.weight") else ""
                problems.append(f"{name} is missing{tied}")
        for head, numbers in holes.items():
            problems.append(f"{head}*: {len(numbers)} tensors of experts {_ranges(numbers)} are missing")
    return problems


def unexpected_problems(names: Iterable[str], layout: Layout, config: ModelConfig) -> list[str]:
    """One line for each layer and reason.

    Args:
        names: names that no tensor of the config has, in the layout's own spelling.
        layout: of the checkpoint.
        config: what the checkpoint should be.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        reason = _reason(name, layout, config)
        groups.setdefault((_layer_prefix(name), reason), []).append(name)
    problems = []
    for (prefix, reason), held in groups.items():
        more = f" and {len(held) - 1} more of {prefix or 'the model'}" if len(held) > 1 else ""
        problems.append(f"unexpected {held[0]}{more}: {reason}")
    return problems


def _layer_prefix(name: str) -> str:
    words = name.removeprefix("model.").split(".")
    if len(words) > 2 and words[0] in ("layers", "mtp") and words[1].isdecimal():
        return name[: name.index(words[0])] + f"{words[0]}.{words[1]}."
    return ""


def _reason(name: str, layout: Layout, config: ModelConfig) -> str:
    row, prefix = row_of(name, layout), _layer_prefix(name)
    number = int(prefix.split(".")[-2]) if prefix else 0
    if row is not None and prefix.startswith("mtp."):
        if config.dspark is not None:
            if number >= DSPARK_STAGES:
                return f"a DSpark draft head has {DSPARK_STAGES} stages"
        elif number >= config.num_nextn_predict_layers:
            return f"num_nextn_predict_layers is {config.num_nextn_predict_layers}"
        kinds = ("window", "learned")
    elif row is not None and prefix.startswith(LAYER_PREFIX[layout]):
        if number >= config.num_hidden_layers:
            return f"num_hidden_layers is {config.num_hidden_layers}"
        kinds = (config.attention_kinds[number], config.router_kinds[number])
    else:
        return "no such tensor in DeepSeek-V4"
    _, experts, tail = name.partition(".experts.")
    if experts and tail.partition(".")[0].isdecimal():
        return f"n_routed_experts is {config.n_routed_experts}"
    if row.parameter.when == "always":
        return "not of this block of the draft head"
    return f"{_ONLY.get(row.parameter.when, 'not expected')}; this one is {' and '.join(kinds)}"


def _ranges(numbers: Iterable[int]) -> str:
    """3, 5-8: the distinct numbers in order."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
