"""`dsv4 train`: from a run file or a preset to a trained, saved and exported model."""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import secrets
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from tokenizers import Tokenizer

from dsv4_jax.command_line import dry_run
from dsv4_jax.command_line.dry_run import amount
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inspection.training_cost import flops_per_token, peak_flops
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.loading import load
from dsv4_jax.model.initial import Network
from dsv4_jax.parameters import Parameters
from dsv4_jax.refusing import refused_together
from dsv4_jax.training import presets
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.keeping import STATES_FOLDER, AnotherRunError, differences
from dsv4_jax.training.live import Shown, Speed
from dsv4_jax.training.lora import LoraNetwork, lora_state, merged, with_lora
from dsv4_jax.training.metrics import GOODPUT_FILE, Goodput, RecordFile, goodput_share, write_whole
from dsv4_jax.training.mixing_gain import gains
from dsv4_jax.training.plots import draw_run
from dsv4_jax.training.run import RunResult, run
from dsv4_jax.training.run_config import RULES, RunConfig
from dsv4_jax.training.saved_states import as_plain
from dsv4_jax.training.sources import ChatFiles
from dsv4_jax.training.step import TrainState, initial_state
from dsv4_jax.training.telling import Silent, Spoken
from dsv4_jax.training.tokenizer import train_tokenizer
from sharding.host_values import fetched

PRESETS: dict[str, Callable[[], RunConfig]] = {
    "stdlib": presets.stdlib,
    "smallest": presets.smallest,
    "flash": presets.flash,
    "sft": presets.sft,
    "lora": presets.lora,
}
RUN_FILE = "run.json"
"""What a run was told, beside what it wrote; a folder that has it belongs to a run."""

MODEL_FOLDER = "model"
TOKENIZER_BYTES = 5_000_000
"""Text of the standard library from which a tokenizer is learnt where none is given."""

TERMINATED = 143
"""Exit code after a SIGTERM, as a shell reports it; the state is saved."""


def configured(what: str, **changes: Any) -> RunConfig:
    """The run that a file or a preset describes, with what the command line changes.

    A file is a Python module with a function `run` without parameters that returns a `RunConfig`. Loading it
    runs it, like any import: it is the user's own program.

    Args:
        what: name of a preset, or path of a file.
        changes: `steps`, `lora_rank`, `chats` (files of them), or fields of `RunConfig`, `logging` and so on;
            None leaves what the run says.

    Raises:
        ProblemsError: there is no such run, the file is none, or a change breaks a rule.
    """
    make = PRESETS.get(what) if not pathlib.Path(what).is_file() else None
    config = make() if make is not None else _from_file(pathlib.Path(what))
    steps = changes.pop("steps", None)
    if steps is not None:
        if steps < 1:
            raise ProblemsError("cannot run this training", [f"steps={steps} must be at least 1"])
        config = config.limited_to(steps)
    rank = changes.pop("lora_rank", None)
    if rank is not None:
        config = presets.with_rank(config, rank)
    chats = changes.pop("chats", None)
    if chats:
        changes["source"] = ChatFiles(tuple(map(str, chats)))
    looks = {name: changes.pop(name, None) for name in ("plot", "tensorboard", "profile_steps")}
    looks = {name: value for name, value in looks.items() if value}
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, logging=dataclasses.replace(config.logging, **looks), **changes)


def _from_file(path: pathlib.Path) -> RunConfig:
    refused = f"no run {str(path)!r}"
    if path.suffix != ".py" or not path.is_file():
        names = ", ".join(PRESETS)
        raise ProblemsError(refused, [f"it is neither a Python file nor one of the presets {names}"])
    spec = importlib.util.spec_from_file_location(f"run_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ProblemsError:
        raise
    except Exception as failure:
        raise ProblemsError(refused, [f"loading it: {type(failure).__name__}: {failure}"]) from failure
    make = getattr(module, "run", None)
    if not callable(make):
        raise ProblemsError(refused, ["it has no function run() that returns a RunConfig"])
    try:
        config = make()
    except ProblemsError:
        raise
    except Exception as failure:
        raise ProblemsError(refused, [f"run(): {type(failure).__name__}: {failure}"]) from failure
    if not isinstance(config, RunConfig):
        raise ProblemsError(refused, [f"run() returned {type(config).__name__}, not a RunConfig"])
    return config


def train(config: RunConfig, *, resume: bool = False) -> RunResult:
    """Trains, and exports the result in the official layout when the last step is done.

    Everything goes below `config.out`: `checkpoints/` (saved states), `metrics.jsonl`, `events.jsonl`,
    `goodput.jsonl`, `run.json`, and at the end `model/`, which `dsv4 generate` loads.

    Args:
        config: of the run.
        resume: go on with the newest saved state.

    Raises:
        ProblemsError: a folder that cannot take the result or holds something else, saved states of another
            run, a training that was halted, a state that went to another place.
        SystemExit: after a SIGTERM, with the code 143; the state is saved.
        KeyboardInterrupt: after a Ctrl-C; the state is saved.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells how long each save took
    is_first = jax.process_index() == 0
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not is_first)
    refused_together(lambda: prepare_folder(config.out, resume))
    refused_together(lambda: _require_files(config))
    before = _changes_told(config, console)
    refused_together(lambda: _write_run(config, as_plain(config)))
    model = starting_model(config)
    console.print(
        f"model: {model.num_params / 1e6:.1f}M parameters; {config.num_steps} steps,"
        f" {amount(config.num_tokens)} tokens, seed {config.seed}; everything goes to {config.out}"
    )
    network, state = starting_state(config, model)
    goodput_file = RecordFile(config.out / GOODPUT_FILE) if is_first else None
    goodput = Goodput(goodput_file, secrets.token_hex(4))
    with contextlib.ExitStack() as stack:
        stack.callback(goodput.close)
        teller: Silent | Spoken = Silent()
        if is_first:
            shown = stack.enter_context(_shown(config, model.config, console))
            told = config.logging
            teller = Spoken(config.out, shown, tensorboard=told.tensorboard, every=told.every)
            stack.callback(teller.close)
        looks = {"sample": _sampler(config, model), "look": _painter(config, model)}
        held = (network, state, model.tokenizer)
        try:
            result = run(config, *held, teller, goodput, resume=resume, **looks)
        except AnotherRunError:
            if before is not None:
                _write_run(config, before)  # nothing was done as this run says
            raise
    _say_how_it_ended(config, result, console)
    if result.ending == "terminated":
        raise SystemExit(TERMINATED)
    if result.ending == "interrupted":
        raise KeyboardInterrupt
    _export(config, model, result, console)
    return result


def starting_state(config: RunConfig, model: LanguageModel) -> tuple[Network | LoraNetwork, TrainState]:
    """What a run trains of a model, before the first step; the parameters' buffers are used as they are.

    Raises:
        ProblemsError: LoRA whose targets are no matrices of the model.
    """
    if config.lora is None:
        return model.network, initial_state(model.parameters, config.optimizer)
    network = with_lora(model.network, config.lora)
    return network, lora_state(network, model.parameters, config.seed, config.optimizer)


def whole_parameters(config: RunConfig, model: LanguageModel, parameters: Parameters) -> Parameters:
    """Those of a model without a branch, from what a run of it trains."""
    if config.lora is None:
        return parameters
    return merged(with_lora(model.network, config.lora), parameters)


def prepare_folder(out: pathlib.Path, resume: bool) -> None:
    """Makes the folder of a run, and refuses one that cannot be written or holds something else.

    Raises:
        ProblemsError: says what is in the way.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        present = sorted(os.listdir(out))
        with tempfile.TemporaryFile(dir=out):  # permission bits do not tell all, least of all to root
            pass
    except (OSError, ValueError) as failure:
        said = getattr(failure, "strerror", None) or str(failure)
        raise ProblemsError("cannot train", [f"out={out}: cannot be written ({said})"]) from failure
    if jax.process_index() != 0:
        return
    if present and RUN_FILE not in present:
        raise ProblemsError("cannot train", [f"out={out}: is not empty and holds no run"])
    if STATES_FOLDER in present and not resume:
        problem = f"out={out}: holds a run; --resume goes on with it, another --out starts anew"
        raise ProblemsError("cannot train", [problem])


def starting_model(config: RunConfig) -> LanguageModel:
    """The model before the first step, with its tokenizer: drawn, or loaded as masters of the param dtype.

    Under LoRA, which leaves it as it is, a model that is stored in FP8 and FP4 stays in them.
    """
    where = {"mesh": config.mesh, "rules": RULES if config.mesh is not None else None}
    if isinstance(config.model, ModelConfig):
        tokenizer = tokenizer_of(config, config.model.vocab_size)
        model = LanguageModel.random(config.model, config.policy, config.seed, **where)
        return LanguageModel(
            model.config, model.policy, model.parameters, tokenizer, placement=model.placement
        )
    dtype = config.policy.param_dtype.name
    weights: Any = "dequantized" if config.lora is None else "native"
    loaded = load(config.model, dtype=dtype, weights=weights, **where)
    tokenizer = loaded.tokenizer if config.tokenizer is None else tokenizer_of(config, 0)
    return LanguageModel(
        loaded.config,
        config.policy,
        loaded.parameters,
        tokenizer,
        # Masters are of another type than what was loaded; what LoRA leaves alone is stored as it was.
        stored=None if config.lora is None else loaded.stored,
        side_files=loaded.side_files,
        placement=loaded.placement,
    )


def tokenizer_of(config: RunConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run: of its file, or learnt from the sources of Python's standard library.

    Raises:
        ProblemsError: for a file that is none.
    """
    if config.tokenizer is None:
        corpus = gather_corpus(TOKENIZER_BYTES)
        return train_tokenizer([document.text for document in corpus.train], vocab_size)
    try:
        return Tokenizer.from_str(config.tokenizer.read_text("utf8"))
    except Exception as failure:  # of the tokenizers library
        raise ProblemsError("cannot train", [f"tokenizer={config.tokenizer}: {failure}"]) from failure


def _shown(config: RunConfig, model: ModelConfig, console: Console) -> Shown:
    first = config.stages[0]
    flops = flops_per_token(model, first.seq_len, dense=first.attention == "dense")
    peak = peak_flops(jax.devices()[0])
    devices = 1 if config.mesh is None else jax.device_count()
    speed = Speed(config.num_steps, config.num_tokens, flops, None if peak is None else peak * devices)
    return Shown(console, config.num_steps, speed, config.logging.every)


def _sampler(config: RunConfig, model: LanguageModel) -> Callable[[Parameters], str] | None:
    """What the model writes, by the most likely tokens; every process takes part."""
    validation = config.validation
    if validation is None or validation.prompt is None or model.tokenizer is None:
        return None

    def sample(parameters: Parameters) -> str:
        whole = with_parameters(model, whole_parameters(config, model, parameters))
        return validation.prompt + whole.generate(validation.prompt, validation.sample_tokens)

    return sample


def _painter(config: RunConfig, model: LanguageModel) -> Callable[[int, Parameters], None] | None:
    """Draws the run so far; every process computes, the first one draws."""
    if not config.logging.plot:
        return None
    first = config.stages[0]
    stream = config.source_of(0).open(model.tokenizer, 1, first.seq_len, config.seed)
    batch = next(stream)

    def paint(step: int, parameters: Parameters) -> None:
        taps = with_parameters(model, whole_parameters(config, model, parameters)).taps(
            batch.tokens, ["attention_mixing", "expert_mixing"], segment_ids=batch.segment_ids
        )
        mixings = [layer[name] for layer in fetched(taps) for name in ("attention_mixing", "expert_mixing")]
        if jax.process_index() == 0:
            draw_run(config.out, gains(mixings), f"{config.out.name}, step {step} of {config.num_steps}")

    return paint


def with_parameters(model: LanguageModel, parameters: Parameters) -> LanguageModel:
    """The same model with other parameters."""
    held = (model.tokenizer, model.stored, model.side_files, model.placement)
    return LanguageModel(model.config, model.policy, parameters, *held)


def _export(config: RunConfig, model: LanguageModel, result: RunResult, console: Console) -> None:
    place = config.out / MODEL_FOLDER
    parameters = whole_parameters(config, model, result.state.params)
    with_parameters(model, parameters).save(place, overwrite=True)
    console.print(f"exported to {place}; try it:")
    prompt = config.validation.prompt if config.validation and config.validation.prompt else "def "
    if jax.process_index() == 0:
        print(f"dsv4 generate {place} {json.dumps(prompt)}", flush=True)


def _say_how_it_ended(config: RunConfig, result: RunResult, console: Console) -> None:
    steps = f"step {result.step} of {config.num_steps}"
    if jax.process_index() == 0:
        share = 100 * goodput_share(config.out / GOODPUT_FILE)
        console.print(f"{result.ending} at {steps}; {share:.0f} % of the time went into steps that last")
    if result.ending in ("interrupted", "terminated"):
        console.print("the state is saved: the same command with --resume goes on")


def _require_files(config: RunConfig) -> None:
    """The files of the data, before a model is made for them."""
    if problems := dry_run.missing_files(config):
        raise ProblemsError("cannot read the training data", problems)


def _changes_told(config: RunConfig, console: Console) -> Any:
    """What the folder's run was told before, if anything; says what is not so any more, apart from the place.

    What must not change is refused later, by what is saved with a state.
    """
    try:
        before = json.loads((config.out / RUN_FILE).read_text("utf8"))
    except (OSError, ValueError):
        return None
    given = as_plain(config)
    if isinstance(before, dict):
        for change in differences(before | {"out": given["out"]}, given):
            console.print(f"changed since the last session: {change.removeprefix('.')}")
    return before


def _write_run(config: RunConfig, told: Any) -> None:
    """What the run was told, by the first process; the first thing that a full disk refuses."""
    if jax.process_index() != 0:
        return
    try:
        write_whole(config.out / RUN_FILE, json.dumps(told, indent=1) + "\n")
    except OSError as failure:
        problem = f"out={config.out}: cannot be written ({failure.strerror})"
        raise ProblemsError("cannot train", [problem]) from failure


def show(config: RunConfig, console: Console) -> None:
    """Prints what a run would do, without a device and without training."""
    dry_run.print_run(config, console)
