"""Which saved states belong to a run, and what becomes of its last one when the disk does not take it."""

import contextlib
import hashlib
import json
import pathlib
import secrets
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsv4_jax.errors import ProblemsError
from dsv4_jax.parameters import Parameters
from dsv4_jax.training.run_config import RunConfig
from dsv4_jax.training.saved_states import SavedStates, as_plain, checksums, named
from dsv4_jax.training.step import TrainState
from sharding.host_values import fetched

STATES_FOLDER = "checkpoints"

FIXED = ("model", "policy", "optimizer", "seed", "lora")
"""Fields of a run that may not change between two sessions: a saved state says nothing without them."""

BASE = "base"
"""What is saved beside a state that leaves out the model it belongs to: which one that is."""


class AnotherRunError(ProblemsError):
    """A saved state that belongs to another run."""


def identity(config: RunConfig) -> dict[str, Any]:
    """What is saved of a run's configuration, as a JSON object."""
    return {name: as_plain(getattr(config, name)) for name in FIXED}


def kept_of(config: RunConfig, state: TrainState) -> TrainState:
    """What is saved of a state: with LoRA the small matrices alone, for the model under them never changes
    and is drawn or loaded again."""
    return state if config.lora is None else state._replace(fixed={})


def whole_of(config: RunConfig, kept: TrainState, base: Parameters) -> TrainState:
    """The state of which `kept_of` kept a part; `base` is what it left out."""
    return kept if config.lora is None else kept._replace(fixed=base)


def base_of(config: RunConfig, state: TrainState) -> str | None:
    """A digest of the model that `kept_of` leaves out; None if it leaves out nothing."""
    if config.lora is None:
        return None
    sums = {name: int(each) for name, each in fetched(checksums(named(state.fixed))).items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def refuse_another_run(config: RunConfig, base: str | None, about: dict) -> None:
    """Compares what was saved beside a state with the run that wants it.

    Args:
        config: of the run.
        base: from `base_of`.
        about: what was saved.

    Raises:
        AnotherRunError: they do not belong together; all differences at once.
    """
    given, saved = identity(config), about["run"]
    problems = [
        f"{name}{difference}" for name in FIXED for difference in differences(saved.get(name), given[name])
    ]
    if not problems and about.get(BASE) != base:
        problems.append(f"model={config.model}: its parameters are not those that were there then")
    if about["step"] > config.num_steps:
        problems.append(f"it has done {about['step']} steps, and the run has only {config.num_steps}")
    if problems:
        raise AnotherRunError("the saved state belongs to another run", problems)


def differences(saved: Any, given: Any) -> list[str]:
    """Where two JSON values differ: ".hidden_size is 64 now, and was 32"."""
    if isinstance(saved, dict) and isinstance(given, dict):
        return [
            f".{key}{words}" for key in given | saved for words in differences(saved.get(key), given.get(key))
        ]
    return [] if saved == given else [f" is {given} now, and was {saved}"]


def save_for_good(
    saved: SavedStates,
    state: TrainState,
    about: dict,
    beside: Mapping[str, np.ndarray],
    out: pathlib.Path,
    *,
    started: bool,
) -> None:
    """The last state of a session: complete on the disk when this returns, in another place if it must be.

    Args:
        saved: where it belongs.
        state: the state; it stays in memory.
        about: what is saved beside it.
        beside: arrays that are, too.
        out: folder of the run.
        started: whether saving it has begun already.

    Raises:
        ProblemsError: it is not where it should be; says where it is.
    """
    step = int(fetched(state.step))
    problems = _problems(saved, state, about, beside, step, started=started)
    if not problems:
        return
    name = f"{out.absolute().name}-unsaved-{secrets.token_hex(3)}"
    places = [out.absolute().with_name(name), pathlib.Path(tempfile.gettempdir()) / name]
    for place in places if jax.process_count() == 1 else []:
        try:
            elsewhere = SavedStates(place / STATES_FOLDER, 1)
        except ProblemsError as refused:
            problems += refused.problems
            continue
        more = _problems(elsewhere, state, about, beside, step, started=False)
        if not more:
            raise ProblemsError(f"the state after step {step} is in {place}, not in {out}", problems)
        problems += more
    raise ProblemsError(f"the state after step {step} could not be written", problems)


def _problems(
    saved: SavedStates,
    state: TrainState,
    about: dict,
    beside: Mapping[str, np.ndarray],
    step: int,
    *,
    started: bool,
) -> list[str]:
    """Saves, waits, and looks; what was in the way."""
    problems: list[str] = []
    if not started:
        with contextlib.suppress(ProblemsError):
            saved.wait()  # an earlier one that failed is no reason not to try this one
    for attempt in range(1 + started):  # one that had begun and failed is tried once more
        try:
            if attempt or not started:
                saved.save(state, about, beside)
            saved.wait()
        except ProblemsError as failure:
            problems += failure.problems
            continue
        if step in saved.steps():
            return []
        problems.append(f"{saved.folder}: step {step} is not there after it was saved")
    return problems
