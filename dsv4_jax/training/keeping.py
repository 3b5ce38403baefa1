"""Which saved states belong to a run, and what becomes of its last one when the disk does not take it."""

import pathlib
import secrets
import tempfile
from typing import Any

import jax

from dsv4_jax.errors import ProblemsError
from dsv4_jax.training.run_config import RunConfig
from dsv4_jax.training.saved_states import SavedStates, as_plain
from dsv4_jax.training.step import TrainState
from sharding.host_values import fetched

STATES_FOLDER = "checkpoints"

FIXED = ("model", "policy", "optimizer", "seed")
"""Fields of a run that may not change between two sessions: a saved state says nothing without them."""


def identity(config: RunConfig) -> dict[str, Any]:
    """What is saved of a run's configuration, as a JSON object."""
    return {name: as_plain(getattr(config, name)) for name in FIXED}


def refuse_another_run(config: RunConfig, about: dict) -> None:
    """Compares what was saved beside a state with the run that wants it.

    Raises:
        ProblemsError: they do not belong together; all differences at once.
    """
    given, saved = identity(config), about["run"]
    problems = [
        f"{name}{difference}" for name in FIXED for difference in differences(saved.get(name), given[name])
    ]
    if about["step"] > config.num_steps:
        problems.append(f"it has done {about['step']} steps, and the run has only {config.num_steps}")
    if problems:
        raise ProblemsError("the saved state belongs to another run", problems)


def differences(saved: Any, given: Any) -> list[str]:
    """Where two JSON values differ: ".hidden_size is 64 now, and was 32"."""
    if isinstance(saved, dict) and isinstance(given, dict):
        return [
            f".{key}{words}" for key in given | saved for words in differences(saved.get(key), given.get(key))
        ]
    return [] if saved == given else [f" is {given} now, and was {saved}"]


def save_for_good(
    saved: SavedStates, state: TrainState, about: dict, out: pathlib.Path, *, started: bool
) -> None:
    """The last state of a session: complete on the disk when this returns, in another place if it must be.

    Args:
        saved: where it belongs.
        state: the state; it stays in memory.
        about: what is saved beside it.
        out: folder of the run.
        started: whether saving it has begun already.

    Raises:
        ProblemsError: it is not where it should be; says where it is.
    """
    step = int(fetched(state.step))
    problems = _problems(saved, state, about, step, started=started)
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
        more = _problems(elsewhere, state, about, step, started=False)
        if not more:
            raise ProblemsError(f"the state after step {step} is in {place}, not in {out}", problems)
        problems += more
    raise ProblemsError(f"the state after step {step} could not be written", problems)


def _problems(saved: SavedStates, state: TrainState, about: dict, step: int, *, started: bool) -> list[str]:
    """Saves, waits, and looks; what was in the way."""
    problems: list[str] = []
    for attempt in range(1 + started):  # one that had begun and failed is tried once more
        try:
            if attempt or not started:
                saved.save(state, about)
            saved.wait()
        except ProblemsError as failure:
            problems += failure.problems
            continue
        if step in saved.steps():
            return []
        problems.append(f"{saved.folder}: step {step} is not there after it was saved")
    return problems
