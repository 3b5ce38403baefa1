"""The first five minutes: train a small, complete V4 on real text, save it, load it, let it write.

Nothing is downloaded. The text is the source of Python's standard library; the model has every part of
V4 (window attention, CSA with its indexer, HCA, hash and learned routing, four residual streams, the MTP
loss, the balance rule), only smaller.
"""

import dataclasses
import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.checkpoint.side_files import with_tokenizer
from dsv4_jax.checkpoint.staging import INCOMING_PREFIX, REPLACED_PREFIX
from dsv4_jax.checkpoint.write import target_problems
from dsv4_jax.config.quantities import seed_problem
from dsv4_jax.errors import CheckpointError, ProblemsError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.loading import load
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.corpus import Corpus, gather_corpus
from dsv4_jax.training.data import TrainingRows, validation_batches
from dsv4_jax.training.loop import InterruptRequest, TrainingResult, train
from dsv4_jax.training.loss_curve import save_loss_curve
from dsv4_jax.training.optimizer import Schedule
from dsv4_jax.training.progress import TrainingDisplay, clock
from dsv4_jax.training.recipe import QUICKSTART, Recipe, planned_steps, start
from dsv4_jax.training.step import StepSettings, initial_state, validation_loss
from dsv4_jax.training.tokenizer import encode_documents, train_tokenizer
from dsv4_jax.training.unigram import unigram_loss, unigram_probabilities

RECORD_FILE = "quickstart.json"
"""Written beside the checkpoint; a folder that has it may be replaced by another quickstart."""

CURVE_FILE = "loss_curve.png"
GRACE_SECONDS = 30.0
"""The clock stops a run that is this much later than the minutes it was given."""

TEMPERATURE, TOP_P = 0.6, 0.9


@dataclasses.dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart measured and wrote. Losses are nats per token on the same validation tokens."""

    out: Path
    ending: str  # 'finished', 'interrupted', 'terminated' or 'out of time'
    steps: int  # done
    validation_loss: float
    unigram_loss: float
    completion: str  # without the prompt
    seconds: float  # everything

    @property
    def percent_below_unigram(self) -> float:
        """How far the model's validation loss lies below the unigram model's."""
        return 100.0 * (1.0 - self.validation_loss / self.unigram_loss)


def quickstart(
    minutes: float = 5.5,
    out: Path = Path("quickstart"),
    seed: int = 0,
    prompt: str = "def ",
    max_new_tokens: int = 160,
    steps: int | None = None,
    recipe: Recipe = QUICKSTART,
    results: TextIO | None = None,
) -> QuickstartResult:
    """Trains, saves in the official layout, loads the folder through the public loader, and completes.

    For the same seed, minutes (or steps), machine and Python the result is the same, bit for bit: the
    number of steps follows from `minutes` by a fixed rule, not from a clock. Only a run that is far behind
    is stopped by the clock, and says so.

    The first Ctrl-C or SIGTERM during training ends it after the current step and keeps what was trained; the
    second one ends the program. After a SIGTERM, or a Ctrl-C during the save, the program ends once the
    folder is complete, with exit code 143 or 130.

    Args:
        minutes: about how long everything takes on two CPU cores.
        out: new or empty folder, or one that an earlier quickstart wrote (it is replaced).
        seed: of parameters, data order and the completion.
        prompt: what the trained model continues.
        max_new_tokens: length of the completion.
        steps: train exactly this long instead of by `minutes`; the clock is then ignored.
        recipe: model and hyperparameters.
        results: where the measured losses and the completion go (default: stdout); progress goes to stderr.

    Raises:
        ProblemsError: for arguments that cannot work, before anything is done; for a training that diverged;
            for a result that could not be written to `out`, which is then kept in a place that is named.
        CorpusError: if this Python has no sources.
    """
    began = time.monotonic()
    results = sys.stdout if results is None else results
    check_arguments(minutes, out, seed, max_new_tokens, steps)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    num_steps = planned_steps(minutes, recipe) if steps is None else steps
    stop_at = None if steps is not None else began + 60.0 * minutes + GRACE_SECONDS

    corpus = gather_corpus(recipe.corpus_bytes)
    num_files = len(corpus.train) + len(corpus.validation)
    console.print(f"text: {num_files} files, {corpus.num_bytes / 1e6:.1f} MB of Python's own sources")
    tokenizer, training, validation = tokenized(corpus, recipe)
    num_tokens = sum(map(len, training))
    console.print(f"tokenizer: {recipe.config.vocab_size} entries, {num_tokens / 1e6:.2f}M training tokens")

    trained = _train(training, recipe, num_steps, seed, stop_at, console)
    if not math.isfinite(trained.reports[-1].loss):
        first = next(i for i, report in enumerate(trained.reports) if not math.isfinite(report.loss))
        raise ProblemsError("the training diverged", [f"from step {first} on its loss is no number"])
    model = LanguageModel(recipe.config, recipe.policy, trained.state.params, tokenizer)
    record = _record(trained, num_steps, seed, minutes, recipe)
    with InterruptRequest(lambda: os.write(2, b"\nstopping when the result is saved\n")) as asked:
        _save_somewhere(model, record, out)
    _say_how_it_ended(trained, num_steps, out, console)
    if "terminated" in (trained.ending, asked.requested and asked.ending):
        raise SystemExit(143)  # what a shell reports of a program that SIGTERM ended
    if asked.requested:
        raise KeyboardInterrupt

    batches = validation_batches(validation, recipe.batch_size, recipe.seq_len)
    batches = spread(batches, recipe.validation_batches)
    baseline = unigram_loss(unigram_probabilities(training, recipe.config.vocab_size), batches)
    loss = validation_loss(Network(recipe.config, recipe.policy), model.parameters, batches)
    save_loss_curve(out / CURVE_FILE, trained.reports, baseline, loss)
    _write_record(out, record | {"validation_loss": loss, "unigram_loss": baseline})
    percent = 100.0 * (1.0 - loss / baseline)
    print(
        f"validation loss {loss:.3f} nats per token, unigram model {baseline:.3f}: {percent:.1f} % below",
        file=results,
        flush=True,
    )
    del model, trained
    completion = _complete(out, recipe.policy, prompt, max_new_tokens, seed, results)
    seconds = time.monotonic() - began
    console.print(f'{clock(seconds)} in all; try: dsv4 generate {out} "import "')
    return QuickstartResult(out, record["ending"], record["steps_done"], loss, baseline, completion, seconds)


def check_arguments(minutes: float, out: Path, seed: int, max_new_tokens: int, steps: int | None) -> None:
    """Refuses what would fail after minutes of work.

    Raises:
        ProblemsError: with every problem.
    """
    problems = []
    if not (math.isfinite(minutes) and minutes > 0):
        problems.append(f"minutes={minutes} must be a positive number")
    if problem := seed_problem(seed):
        problems.append(problem)
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens={max_new_tokens} must not be negative")
    if steps is not None and steps < 1:
        problems.append(f"steps={steps} must be at least 1")
    ours = is_former_quickstart(out)
    problems += [f"out={out} cannot take the result: {why}" for why in target_problems(out, overwrite=ours)]
    if problems:
        raise ProblemsError("cannot start the quickstart", problems)


def is_former_quickstart(out: Path) -> bool:
    """Whether a folder is an earlier quickstart's, which may be replaced; also after a save was cut short."""
    try:
        return (out / RECORD_FILE).is_file() or any(out.glob(f"{REPLACED_PREFIX}*/{RECORD_FILE}"))
    except (OSError, ValueError):
        return False


def _save_somewhere(model: LanguageModel, record: dict, out: Path) -> None:
    """Writes the folder with its record, all of it or nothing; if `out` does not take it, elsewhere.

    Raises:
        ProblemsError: the result is not in `out`; it says where it is.
    """

    def save(place: Path, overwrite: bool) -> None:
        side_files = with_tokenizer({}, model.tokenizer)
        more_files = {RECORD_FILE: _record_text(record)}
        save_checkpoint(
            place,
            model.config,
            model.parameters,
            side_files=side_files,
            more_files=more_files,
            overwrite=overwrite,
        )

    try:
        return save(out, is_former_quickstart(out))
    except (CheckpointError, OSError) as failure:
        refused, problems = failure, [str(failure)]
    token = secrets.token_hex(3)
    name = f"{out.name}-unsaved-{token}"
    for place in (out.absolute().with_name(name), Path(tempfile.gettempdir()) / name):
        try:
            save(place, False)
        except (CheckpointError, OSError) as failure:
            problems.append(str(failure))
            continue
        raise ProblemsError(f"the trained model is in {place}, not in {out}", problems) from refused
    raise ProblemsError(f"the trained model could not be written to {out}, nor elsewhere", problems)


def tokenized(corpus: Corpus, recipe: Recipe) -> tuple[Tokenizer, list[np.ndarray], list[np.ndarray]]:
    """The tokenizer learnt from the training files, and the token ids of both parts' documents."""
    texts = [document.text for document in corpus.train]
    tokenizer = train_tokenizer(texts, recipe.config.vocab_size)
    validation = [document.text for document in corpus.validation]
    return tokenizer, encode_documents(tokenizer, texts), encode_documents(tokenizer, validation)


def spread(items: Sequence, count: int) -> list:
    """At most `count` items, evenly spread over the sequence."""
    picks = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[pick] for pick in picks]


def _train(
    training: list[np.ndarray],
    recipe: Recipe,
    num_steps: int,
    seed: int,
    stop_at: float | None,
    console: Console,
) -> TrainingResult:
    config, policy = recipe.config, recipe.policy
    parameters = start(recipe, seed)
    schedule = Schedule(recipe.peak_learning_rate, num_steps, recipe.warmup_fraction)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    num_layers = config.num_hidden_layers
    console.print(
        f"model: {num_params / 1e6:.1f}M parameters, {num_layers} layers and an MTP block; "
        f"{num_steps} steps of {recipe.batch_size} x {recipe.seq_len} tokens, seed {seed}"
    )
    rows = TrainingRows(training, recipe.batch_size, recipe.seq_len, seed)
    display = TrainingDisplay(num_steps, recipe.batch_size * recipe.seq_len, console)

    def announce() -> None:
        # os.write: a signal may arrive in the middle of any print
        os.write(2, b"\nstopping after this step and keeping the result (Ctrl-C again: quit)\n")

    with InterruptRequest(announce) as interrupt, display:
        return train(
            Network(config, policy),
            StepSettings(recipe.optimizer, indexer="sparse"),
            schedule,
            initial_state(parameters, recipe.optimizer),
            rows,
            on_step=lambda report: display.advance(report.main),
            interrupt=interrupt,
            stop_at=stop_at,
        )


def _say_how_it_ended(result: TrainingResult, num_steps: int, out: Path, console: Console) -> None:
    done = len(result.reports)
    if result.ending == "out of time":
        console.print(
            f"WARNING: this machine is slower than planned: the clock ended the training at step {done} of "
            f"{num_steps}, before the learning rate came down. Where the clock stops is not reproducible; "
            f"use --steps for a run that is."
        )
    elif result.ending in ("interrupted", "terminated"):
        console.print(f"{result.ending} at step {done} of {num_steps}")
    console.print(f"trained {done} steps in {clock(result.seconds)}; saved to {out}")


def _record(result: TrainingResult, num_steps: int, seed: int, minutes: float, recipe: Recipe) -> dict:
    return {
        "ending": result.ending,
        "seed": seed,
        "minutes": minutes,
        "steps_planned": num_steps,
        "steps_done": len(result.reports),
        "batch_size": recipe.batch_size,
        "seq_len": recipe.seq_len,
        "peak_learning_rate": recipe.peak_learning_rate,
        "training_seconds": round(result.seconds, 1),
        "steps": [
            {key: round(value, 6) for key, value in report.scalars.items()} for report in result.reports
        ],
    }


def _record_text(record: dict) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def _write_record(out: Path, record: dict) -> None:
    """Replaces the record in one step: a reader finds the old one or the new one."""
    incoming = out / f"{INCOMING_PREFIX}{RECORD_FILE}"
    incoming.write_bytes(_record_text(record))
    os.replace(incoming, out / RECORD_FILE)


def _complete(out: Path, policy: Policy, prompt: str, max_new_tokens: int, seed: int, results: TextIO) -> str:
    """Loads the folder as anybody would, and prints the prompt with its continuation as it comes."""
    model = load(out, dtype=np.dtype(policy.param_dtype).name)
    print(f"--- {out} continues {prompt!r} ---\n{prompt}", end="", file=results, flush=True)
    pieces = []
    for piece in model.stream_text(prompt, max_new_tokens, temperature=TEMPERATURE, seed=seed, top_p=TOP_P):
        pieces.append(piece)
        print(piece, end="", file=results, flush=True)
    print("\n---", file=results, flush=True)
    return "".join(pieces)
