"""What a training run would do, from shapes: nothing is allocated, and no device is asked for."""

import dataclasses
import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from dsv4_jax.config import ModelConfig
from dsv4_jax.config import io as config_io
from dsv4_jax.inspection.costs import count_mtp, count_parameters
from dsv4_jax.inspection.training_cost import flops_per_token, training_bytes
from dsv4_jax.model.initial import Network
from dsv4_jax.parameters import LORA, Parameter, parameters
from dsv4_jax.training.documents import DataError, matching_files
from dsv4_jax.training.health import Health
from dsv4_jax.training.lora import Lora, chosen, lora_shapes
from dsv4_jax.training.optimizer import split_trainable
from dsv4_jax.training.optimizer_groups import Treated, partition
from dsv4_jax.training.run_config import RunConfig
from dsv4_jax.training.sources import ChatFiles, JsonLines, ParquetFiles, TextFiles, TokenFiles


def print_run(config: RunConfig, console: Console) -> None:
    """Model, mesh, parameters by optimizer group, bytes a device, stages, rates and data.

    Raises:
        ConfigError, CheckpointError: for a checkpoint folder whose config.json cannot be used.
        ProblemsError: for a mesh that does not fit the parameters.
    """
    model = model_of(config)
    print_model(config, model, console)
    if config.lora is None:
        console.print(_groups(config, model))
    else:
        _print_lora(config.lora, model, console)
    console.print(_bytes(config, model))
    console.print(_stages(config))
    for number, stage in enumerate(config.stages):
        flops = flops_per_token(model, stage.seq_len, dense=stage.attention == "dense")
        flops *= stage.batch_size * stage.seq_len
        ramp = stage.ramp
        grows = f"; {ramp.first:,} rows at first, full from step {ramp.num_steps:,} on" if ramp else ""
        console.print(f"stage {number}: {flops:.2e} FLOP a full step{grows}")
    for number in range(len(config.stages)):
        if number == 0 or config.stages[number].source is not None:
            console.print(f"text from stage {number} on: {described(config.source_of(number))}")
    for problem in missing_files(config):
        console.print(f"NOT THERE YET: {problem}")
    rate, last = config.learning_rate, config.num_steps
    start = rate.decay_start(last)
    console.print(
        f"learning rate: {rate.warmup_steps} steps up to {rate.peak:g}, constant until step {start},"
        f" {rate.shape} decay to {rate.final_fraction * rate.peak:g} at step {last}"
    )
    losses = config.losses
    console.print(
        f"losses: MTP {losses.mtp:g}, from step {start} on {losses.mtp_in_decay:g}; balance"
        f" {losses.balance:g}; indexer {losses.indexer:g}; z {losses.z:g}; bias speed {losses.bias_speed:g}"
    )
    kept, health = config.checkpoints, config.health
    console.print(f"saved states: every {kept.every} steps, {kept.keep} are kept, in {config.out}")
    console.print(
        f"numbers that are none: {health.on_nan}; spikes: {health.on_spike}{_after_spike(health)};"
        f" a hang ends the run after {health.hang_seconds} seconds"
    )


def described(source: object) -> str:
    """A source in a line: its kind, its files, and the settings that are not the usual ones."""
    words = []
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        if dataclasses.is_dataclass(value):
            value = getattr(value, "name", None) or described(value)
        elif isinstance(value, tuple):
            value = ", ".join(map(str, value))
        if field.name == "files" or getattr(source, field.name) != field.default:
            words.append(str(value) if field.name == "files" else f"{field.name} {value}")
    return ": ".join([type(source).__name__, *filter(None, ["; ".join(words)])])


def model_of(config: RunConfig) -> ModelConfig:
    """The model of a run; of a checkpoint only its config.json is read."""
    if isinstance(config.model, ModelConfig):
        return config.model
    return config_io.read_config_file(config.model, text_only=False, allow_links=None).config


def print_model(config: RunConfig, model: ModelConfig, console: Console) -> None:
    """Two lines on the model and the mesh."""
    counts, (mtp, _) = count_parameters(model), count_mtp(model)
    origin = "fresh" if isinstance(config.model, ModelConfig) else f"from {config.model}"
    console.print(
        f"model: {amount(counts.total)} parameters, {amount(counts.active)} active, MTP {amount(mtp)};"
        f" {model.num_hidden_layers} layers, {origin}; {config.policy.param_dtype.name} parameters,"
        f" {config.policy.compute_dtype.name} arithmetic, remat {config.policy.remat}"
    )
    sent = "; gradients travel in bfloat16" if config.exchange == "bfloat16" else ""
    console.print(f"mesh: {config.mesh or 'one device'}{sent}; {amount(config.num_tokens)} tokens in all")


def _groups(config: RunConfig, model: ModelConfig) -> Table:
    """The partition of the parameters, a line for each way in which some are treated."""
    found: dict[tuple[str, bool], list[Treated]] = {}
    for each in partition(model, config.optimizer):
        found.setdefault((each.group, each.decayed), []).append(each)
    table = Table("group", "arrays", "matrices", "parameters", "such as", title=f"{config.optimizer}")
    for (group, decayed), rows in found.items():
        name = "rule, no gradient" if group == "rule" else f"{group}, {'' if decayed else 'not '}decayed"
        matrices = sum(count for each in rows for count, _, _ in each.matrices)
        elements = sum(math.prod(each.shape) for each in rows)
        shown = f"{matrices:,}" if matrices else ""
        table.add_row(name, str(len(rows)), shown, f"{elements:,}", rows[0].path)
    return table


def _print_lora(lora: Lora, model: ModelConfig, console: Console) -> None:
    """What LoRA trains, a line for each kind of matrix that it changes, and what stays as it is."""
    found: dict[str, list[Parameter]] = {}
    for path, parameter in chosen(model, lora).items():
        name = "/".join(key for key in path if isinstance(key, str) and key not in ("stacks", "blocks"))
        found.setdefault(name, []).append(parameter)
    table = Table("beside", "matrices", "trained", title=f"LoRA of rank {lora.rank}, times {lora.scale:g}")
    trained = 0
    for name, rows in found.items():
        counts = [math.prod(row.leading) for row in rows]
        small = sum(n * lora.rank * sum(row.stored) for n, row in zip(counts, rows, strict=True))
        table.add_row(name, f"{sum(counts):,}", f"{small:,}")
        trained += small
    console.print(table)
    frozen = sum(parameter.size for parameter in parameters(model).values())
    share = 100 * trained / frozen
    console.print(
        f"trained: {trained:,} numbers, {share:.2f} % of the model's; frozen: the model itself, {frozen:,}"
        " numbers, its routers' biases included; what is exported has them merged"
    )


def missing_files(config: RunConfig) -> list[str]:
    """What the sources of a run ask for and nobody has, a sentence each; no file is read for it."""
    sources = [config.source_of(number) for number in range(len(config.stages))]
    if config.validation is not None:
        sources.append(config.validation.source)
    problems = []
    for source in dict.fromkeys(sources):
        if isinstance(source, (TextFiles, JsonLines, ParquetFiles, TokenFiles, ChatFiles)):
            try:
                matching_files(source.files)
            except DataError as missing:
                problems += missing.problems
    return list(dict.fromkeys(problems))


def _after_spike(health: Health) -> str:
    """What follows a spike, if anything does."""
    if health.on_spike != "roll back" or not health.anticipation_steps:
        return ""
    return f", then {health.anticipation_steps} steps of anticipatory routing, lag {health.anticipation_lag}"


def moments_share(config: RunConfig, model: ModelConfig) -> float:
    """Bytes of the optimizer's moments over bytes of the parameters, from shapes."""
    shapes = Network(model, config.policy).shapes()
    trained, _ = split_trainable(shapes)
    if config.lora is not None:
        trained = {LORA: lora_shapes(model, config.lora)}
    moments = jax.eval_shape(config.optimizer.transform().init, trained)
    return _size(moments) / _size(shapes)


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes(config: RunConfig, model: ModelConfig) -> Table:
    stage = max(config.stages, key=lambda stage: stage.batch_size * stage.seq_len // stage.accumulate)
    rows = stage.batch_size // stage.accumulate
    share = moments_share(config, model)
    found = training_bytes(model, config.policy, share, config.mesh or "data=1", rows, stage.seq_len)
    if config.lora is not None:  # each changed matrix is made anew beside its own, and has a gradient
        sizes = [parameter.size for parameter in chosen(model, config.lora).values()]
        changed = sum(sizes) / sum(parameter.size for parameter in parameters(model).values())
        made = math.ceil(found.parameters * changed)
        found = dataclasses.replace(found, parameters=found.parameters + made, gradients=made)
    table = Table("what a device holds", "GiB", title="memory, as far as shapes tell")
    for name, value in dataclasses.asdict(found).items():
        table.add_row("streams between layers" if name == "streams" else name, f"{value / 2**30:,.3f}")
    table.add_row("together, at least", f"{found.total / 2**30:,.3f}")
    return table


def _stages(config: RunConfig) -> Table:
    heads = ("", "steps", "length", "rows", "in", "attention", "indexer", "tokens")
    table = Table(*heads, title="stages; rows of a full batch, in so many parts")
    for number, stage in enumerate(config.stages):
        table.add_row(
            str(number),
            f"{stage.num_steps:,}",
            f"{stage.seq_len:,}",
            f"{stage.batch_size:,}",
            str(stage.accumulate),
            stage.attention,
            stage.indexer,
            amount(stage.num_tokens),
        )
    return table


def amount(number: int) -> str:
    """A count in a few characters: 284.33B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,}"
