"""Tensors that are missing or should not be there, said in the model's words and a line a layer."""

from collections.abc import Iterable, Mapping

from dsv4_jax.checkpoint.layout import row_of
from dsv4_jax.checkpoint.names import LAYER_PREFIX, Layout, TensorSpec
from dsv4_jax.config import ModelConfig

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
    for spec in expected:
        layers.setdefault(_layer_prefix(spec.name), []).append(spec)
    problems = []
    for prefix, specs in layers.items():
        missing = [spec.name for spec in specs if spec.name not in found]
        if len(missing) == len(specs) > 1 and prefix:
            problem = f"all {len(missing)} tensors of {prefix}* are missing"
            if prefix == "mtp.0.":
                problem += "; num_nextn_predict_layers: 0 loads the model without its MTP block"
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
        if number >= config.num_nextn_predict_layers:
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
