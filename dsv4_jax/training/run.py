"""A training run: steps through all stages, saved states, and what is done when something goes wrong.

The host is always one step ahead: a step's numbers are fetched when the next step is on its way, and waited
for only before a state is saved, at a validation and at the end.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dsv4_jax.errors import ProblemsError
from dsv4_jax.model.initial import Network
from dsv4_jax.parameters import Parameters
from dsv4_jax.training.anticipatory_routing import chosen_experts
from dsv4_jax.training.batches_ahead import BatchesAhead
from dsv4_jax.training.data import Batch
from dsv4_jax.training.health import Finding, Observer, kept_if_finite, worse
from dsv4_jax.training.keeping import (
    BASE,
    STATES_FOLDER,
    base_of,
    identity,
    kept_of,
    refuse_another_run,
    save_for_good,
    whole_of,
)
from dsv4_jax.training.loop import Ending, InterruptRequest
from dsv4_jax.training.lora import LoraNetwork
from dsv4_jax.training.metrics import Goodput
from dsv4_jax.training.run_config import Place, RunConfig
from dsv4_jax.training.saved_states import Restored, SavedStates, reason
from dsv4_jax.training.stage_streams import Streams, stage_seed
from dsv4_jax.training.step import Rates, StepReport, StepSettings, TrainState, train_step, validation_loss
from dsv4_jax.training.watchdog import Watchdog
from sharding.agreement import collected
from sharding.host_values import fetched

PROFILE_FOLDER = "profile"
STACKS_FILE = "stacks.txt"


class Teller(Protocol):
    """Who is told what happens; several processes have one that speaks."""

    def step(self, record: dict[str, Any], loads: np.ndarray | None) -> None:
        """The numbers of one step, and f32[layers, E] tokens by expert, if known."""

    def event(self, kind: str, step: int, words: str) -> None:
        """Something that does not happen at every step; `step` steps are done."""

    def validated(self, step: int, loss: float, sample: str | None) -> None:
        """A validation; `loss` in nats per target."""

    def restarted(self, step: int) -> int:
        """The run goes on after `step` steps. Returns how many were told already that will come again."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What came out of a session.

    Attributes:
        state: the last one, on its devices.
        ending: "finished", or who asked it to stop.
        step: steps done.
        validation_loss: the last one that was measured, in nats per target.
    """

    state: TrainState
    ending: Ending
    step: int
    validation_loss: float | None


class _Running(NamedTuple):
    step: int  # steps done with it
    place: Place
    rates: Rates
    tokens: int
    report: StepReport  # on the device
    lag: int | None  # steps between the parameters that chose the experts and those of the step


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def guarded_step(
    network: Network | LoraNetwork,
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    rates: Rates,
    experts: jax.Array | None = None,
) -> tuple[TrainState, StepReport]:
    """`train_step`, which leaves everything but the count of steps as it was where its loss or gradient is
    not finite. Donates the state."""
    after, report = train_step(network, settings, state, batch, rates, experts)
    return kept_if_finite(state, after, report), report


def run(
    config: RunConfig,
    network: Network | LoraNetwork,
    state: TrainState,
    tokenizer: Any,
    teller: Teller,
    goodput: Goodput,
    *,
    resume: bool = False,
    sample: Callable[[Parameters], str | None] | None = None,
    look: Callable[[int, Parameters], None] | None = None,
) -> RunResult:
    """Trains until all stages are done or somebody asks to stop, and leaves a saved state.

    Args:
        config: of the run.
        network: the model; one with the branch of `lora`, if the run says so.
        state: before the first step, consumed; of a run that goes on its shapes and places alone are used.
        tokenizer: for the sources.
        teller: who is told.
        goodput: where time goes.
        resume: go on with the newest saved state, if there is one.
        sample: what the model writes, shown at validations.
        look: called with the step and the parameters at validations and at the end, for pictures.

    Raises:
        ProblemsError: a folder that cannot be written, saved states that cannot be read or belong to another
            run, a run that its policy halts, and a last state that went to another place, which is named.
    """
    session = _Session(config, network, state, tokenizer, teller, goodput, (sample, look))
    # os.write: a signal may arrive in the middle of any print
    announce = functools.partial(
        os.write, 2, b"\nsaving the state and stopping (Ctrl-C again: stop at once)\n"
    )
    with Watchdog(config.health.hang_seconds, config.out / STACKS_FILE) as watchdog:
        with InterruptRequest(announce) as interrupt, contextlib.closing(session.saved):
            return session.run(watchdog, interrupt, resume)


class _Session:
    """The parts of a run that change while it goes."""

    def __init__(
        self,
        config: RunConfig,
        network: Network | LoraNetwork,
        state: TrainState,
        tokenizer: Any,
        teller: Teller,
        goodput: Goodput,
        looks: tuple[Callable[[Parameters], str | None] | None, Callable[[int, Parameters], None] | None],
    ) -> None:
        self.config, self.network, self.teller, self.goodput = config, network, teller, goodput
        self.state = state
        self.like = jax.tree.map(_described, kept_of(config, state))
        self.base = base_of(config, state)
        self.sample, self.look = looks
        self.batches = BatchesAhead(config, Streams(config, tokenizer))
        self.observer = Observer(config.health)
        self.step = int(fetched(state.step))
        self.anticipates_until = 0
        self.saved_step: int | None = None
        self.validation_loss: float | None = None
        self.programs: set[tuple] = set()
        self.last_told = time.monotonic()  # without what was spent on anything but steps and data
        self.validation_batches: list[Batch] | None = None
        self.tokenizer = tokenizer
        self.saved = SavedStates(config.out / STATES_FOLDER, config.checkpoints.keep)

    # ---- the loop ------------------------------------------------------------------------------------

    def run(self, watchdog: Watchdog, interrupt: InterruptRequest, resume: bool) -> RunResult:
        """See `run`."""
        self.watchdog = watchdog
        if resume:
            with self.goodput.spent_on("restore"):
                self._restart()
        if self.step == 0 and self.config.health.rolls_back:
            self._save()
        ending: Ending = "finished"
        running: _Running | None = None
        try:
            while self.step < self.config.num_steps:
                previous, running = running, self._start_step()
                finding = self._settle(previous)
                stops = self._asked_to_stop(interrupt)
                if stops or self._is_due() or finding.action in ("halt", "roll back"):
                    finding = worse(finding, self._settle(running))
                    running = None
                if finding.action == "halt":
                    self._halt(finding)
                if finding.action == "roll back":
                    self._roll_back(finding)
                    continue
                self._do_what_is_due(stops=bool(stops))
                if stops and self.step < self.config.num_steps:
                    ending = stops
                    break
        finally:
            self._end_profile()
        self._save_for_good()
        return RunResult(self.state, ending, self.step, self.validation_loss)

    def _start_step(self) -> _Running:
        place, rates = self.config.place(self.step), self.config.rates(self.step)
        self.watchdog.beat(f"step {self.step + 1} was started")
        self._profile()
        with self.goodput.spent_on("data"):
            batch, experts, chosen_at = self.batches.next(self.step, self.anticipates_until, self._chosen)
            on_devices = self._on_devices(batch)
        settings = self.config.settings(place)
        lag, given = None, (self.network, settings, self.state, on_devices, rates)
        if experts is not None:
            lag, given = self.step - chosen_at, (*given, self.network.put(experts, "layers B T Ke"))
        program = (settings, batch.tokens.shape, lag is None)
        if program in self.programs:
            self.state, report = guarded_step(*given)
        else:
            with self.goodput.spent_on("compiling"):
                self.state, report = guarded_step(*given)
            self.programs.add(program)
        self.step += 1
        self.goodput.steps += 1
        return _Running(self.step, place, rates, batch.tokens.size, report, lag)

    def _on_devices(self, batch: Batch) -> Batch:
        return Batch(*(None if each is None else self.network.put(each, "B T") for each in batch))

    def _chosen(self, batch: Batch, step: int) -> np.ndarray:
        """The experts of a later step, by the parameters of now (report, section 4.2.3)."""
        mode = self.config.mode(step)
        return fetched(chosen_experts(self.network, self.state.params, self._on_devices(batch), mode))

    def _settle(self, done: _Running | None) -> Finding:
        """Waits for a step's numbers, tells them, and judges them."""
        if done is None:
            return Finding()
        report = fetched(done.report)
        loads = report.loads
        numbers = {name: float(value) for name, value in report.scalars.items()}
        now = time.monotonic() - self.goodput.besides
        rates = {f"rate_{name}": float(rate) for name, rate in done.rates._asdict().items()}
        record = {"step": done.step, "stage": done.place.stage, "tokens": done.tokens, **numbers, **rates}
        if done.lag is not None:
            record["routing_lag"] = done.lag
        record["seconds"] = now - self.last_told
        self.last_told = now
        self.teller.step(record, loads)
        norm = math.hypot(numbers["grad_norm"], numbers["indexer_grad_norm"])
        finding = self.observer.judge(done.step, numbers["loss"], norm)
        if finding.words:
            self.teller.event(finding.kind, done.step, f"{finding.words}; {finding.action}")
        return finding

    def _asked_to_stop(self, interrupt: InterruptRequest) -> Ending | None:
        """Of one process, or, every few steps, of any of several: all must stop after the same step."""
        asked = interrupt.ending if interrupt.requested else None
        if jax.process_count() == 1:
            return asked
        if self.step % self.config.logging.every and not self._is_due():
            return None
        said = [each[0] for each in collected([asked or ""]) if each[0]]
        return said[0] if said else None

    # ---- what comes at intervals -----------------------------------------------------------------------

    def _is_due(self) -> bool:
        last = self.step == self.config.num_steps
        profile = self.config.logging.profile_steps
        ends_profile = profile is not None and self.step == profile[1] + 1
        return last or ends_profile or self._saves() or self._validates()

    def _saves(self) -> bool:
        return self.step % self.config.checkpoints.every == 0

    def _validates(self) -> bool:
        validation = self.config.validation
        last = self.step == self.config.num_steps
        return validation is not None and (self.step % validation.every == 0 or last)

    def _do_what_is_due(self, *, stops: bool) -> None:
        if self._saves() and not stops:
            self._save()
        if self._validates() and not stops:
            self._validate()
        last = self.step == self.config.num_steps
        if self.look is not None and not stops and (self._validates() or last):
            with self.goodput.spent_on("looking"):
                try:
                    self.look(self.step, self.state.params)
                except OSError as failure:  # a picture is no reason to end a run
                    self.teller.event("not drawn", self.step, f"NOT DRAWN: {failure}")

    def _validate(self) -> None:
        assert self.config.validation is not None
        self.watchdog.beat("validating")
        with self.goodput.spent_on("validating"):
            if self.validation_batches is None:
                self.validation_batches = self._held_out()
            params, mode = self.state.params, self.config.mode(self.step - 1)
            self.validation_loss = validation_loss(self.network, params, self.validation_batches, mode)
            text = None if self.sample is None else self.sample(params)
        self.teller.validated(self.step, self.validation_loss, text)

    def _held_out(self) -> list[Batch]:
        validation, first = self.config.validation, self.config.stages[0]
        seed = stage_seed(self.config.seed, 0)
        stream = validation.source.open(self.tokenizer, first.unit, first.seq_len, seed)
        return [next(stream) for _ in range(validation.num_batches)]

    def _profile(self) -> None:
        steps = self.config.logging.profile_steps
        if steps is not None and self.step == steps[0]:
            jax.profiler.start_trace(str(self.config.out / PROFILE_FOLDER))
            self.profiles = True
        elif steps is not None and self.step == steps[1] + 1:
            self._end_profile()

    profiles = False

    def _end_profile(self) -> None:
        if self.profiles:
            self.profiles = False
            place = self.config.out / PROFILE_FOLDER
            try:
                jax.profiler.stop_trace()
                self.teller.event("profile", self.step, f"recorded in {place}")
            except (OSError, RuntimeError) as failure:
                self.teller.event("profile", self.step, f"NOT RECORDED in {place}: {reason(failure)}")

    # ---- saved states -----------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        return {
            "run": identity(self.config),
            "mesh": self.config.mesh,
            "processes": jax.process_count(),
            "stage": self.config.place(self.step - 1).stage if self.step else 0,
            "data": self.batches.state(),
            "observer": self.observer.state(),
            "anticipates_until": self.anticipates_until,
            "experts_chosen_at": self.batches.chosen_at(),
            BASE: self.base,
        }

    def _save(self) -> None:
        """Starts a save; a failure of it, or of the one before, is told, and tried again at the next one."""
        self.watchdog.beat("saving")
        with self.goodput.spent_on("saving"):
            given = kept_of(self.config, self.state), self._about(), self.batches.chosen()
            before, now = _refused(self.saved.wait), _refused(lambda: self.saved.save(*given))
            self.saved_step = None if now else self.step
            if failed := "; ".join([*before, *now]):
                words = f"NOT SAVED, training goes on and tries again: {failed}"
                self.teller.event("not saved", self.step, words)
        self.goodput.write()

    def _save_for_good(self) -> None:
        self.watchdog.beat("saving the last state")
        with self.goodput.spent_on("saving"):
            started = self.saved_step == self.step
            what = kept_of(self.config, self.state), self._about(), self.batches.chosen()
            save_for_good(self.saved, *what, self.config.out, started=started)
        self.goodput.write()

    def _restart(self) -> None:
        if not self.saved.steps():
            self.teller.event("resume", 0, "there is no saved state: starting at step 0")
            self.goodput.repeated_steps = self.teller.restarted(0)
            return
        restored = self._restored()
        self.observer.restore(restored.about["observer"])
        at = restored.about.get("experts_chosen_at", ())
        self.batches.restore(restored.about["data"], self.step, restored.beside, at)
        self.goodput.repeated_steps = self.teller.restarted(self.step)
        self.teller.event("resume", self.step, f"going on after step {self.step} of {self.config.num_steps}")

    def _restored(self) -> Restored:
        """Reads the newest good state; the one in memory makes room for it."""
        self.watchdog.beat("reading a saved state")
        self.saved.wait()
        base = self.state.fixed
        jax.tree.map(lambda leaf: leaf.delete(), kept_of(self.config, self.state))
        accept = functools.partial(refuse_another_run, self.config, self.base)
        restored = self.saved.restore(self.like, accept)
        if restored is None:
            raise ProblemsError("cannot go back", [f"{self.saved.folder}: there is no saved state"])
        for problem in restored.problems:
            words = f"UNREADABLE, moved aside, the one before is used: {problem}"
            self.teller.event("unreadable", restored.about["step"], words)
        self.state = whole_of(self.config, restored.state, base)
        self.step = self.saved_step = restored.about["step"]
        self.anticipates_until = restored.about["anticipates_until"]
        return restored

    # ---- when something goes wrong ----------------------------------------------------------------------

    def _halt(self, finding: Finding) -> None:
        """Ends the run. After numbers that were not finite the parameters are still good, and are saved."""
        problems = [finding.words]
        if finding.kind == "not finite":
            try:
                self._save_for_good()
                problems.append(f"the parameters before it are saved as step {self.step}")
            except ProblemsError as failure:
                problems += [failure.what, *failure.problems]
        else:
            self.saved.wait()
            problems.append(f"saved states: {self.saved.steps()}")
        raise ProblemsError("the training was halted by its policy", problems)

    def _roll_back(self, finding: Finding) -> None:
        """Back to the last saved state; the data goes on, so that what led here is not seen again."""
        data, place = self.batches.state(), self.step
        with self.goodput.spent_on("restore"):
            restored = self._restored()
        self.observer.restore(restored.about["observer"], counting=False)
        if data["stage"] is not None and restored.about["stage"] == self.config.place(place - 1).stage:
            self.batches.restore(data)
        else:
            self.batches.restore(restored.about["data"])
        words = f"went back from step {place} to step {self.step}"
        if finding.kind == "spike" and (length := self.config.health.anticipation_steps):
            self.anticipates_until = self.step + length
            lag = self.config.health.anticipation_lag
            words += f"; experts are chosen up to {lag} steps ahead until step {self.anticipates_until}"
        self.goodput.repeated_steps += place - self.step
        self.teller.event("rolled back", self.step, words)


def _refused(work: Callable[[], object]) -> tuple[str, ...]:
    """The problems for which it refuses; none if it does not."""
    try:
        work()
    except ProblemsError as refusal:
        return refusal.problems
    return ()


def _described(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
