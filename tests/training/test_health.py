"""What is judged of a run's numbers, and what is done about steps that are none."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.training.health import LEAST_STEPS, Health, Observer, kept_if_finite
from dsv4_jax.training.step import StepReport, TrainState

NAN = float("nan")


def judged(observer, losses, first=1):
    return [observer.judge(first + i, loss, 1.0).action for i, loss in enumerate(losses)]


def usual(count):
    return [3.0 + 0.01 * (-1) ** i for i in range(count)]


def test_a_number_that_is_none_is_skipped_until_there_are_too_many():
    observer = Observer(Health(on_nan="skip", most=3))
    assert judged(observer, [3.0, NAN, NAN, 3.0, NAN, NAN, NAN]) == [
        "go on", "skip", "skip", "go on", "skip", "skip", "halt"
    ]  # fmt: skip
    assert Observer(Health()).judge(1, 3.0, float("inf")).action == "halt"
    assert "gradient norm inf" in Observer(Health()).judge(7, 3.0, float("inf")).words


def test_a_spike_is_far_above_the_losses_before_it():
    health = Health(on_spike="roll back", spike_size=10.0)
    observer = Observer(health)
    assert set(judged(observer, usual(LEAST_STEPS))) == {"go on"}
    assert observer.judge(21, 3.05, 1.0).action == "go on"
    finding = observer.judge(22, 3.5, 1.0)
    assert (finding.kind, finding.action) == ("spike", "roll back") and "step 22: loss 3.5" in finding.words
    assert Observer(health).judge(1, 1e9, 1.0).action == "go on"  # nothing to compare with
    falling = Observer(health)
    assert set(judged(falling, np.linspace(10, 1, 200))) == {"go on"}
    ignoring = Observer(Health())
    judged(ignoring, usual(LEAST_STEPS))
    told = ignoring.judge(21, 9.0, 1.0)
    assert (told.kind, told.action) == ("spike", "go on") and told.words


def test_too_many_rollbacks_halt_unless_good_steps_lie_between():
    observer = Observer(Health(on_nan="roll back", most=2, window=LEAST_STEPS))
    actions = []
    for _ in range(3):
        actions.append(observer.judge(1, NAN, 1.0).action)
        judged(observer, usual(3))
    assert actions == ["roll back", "roll back", "halt"]
    observer = Observer(Health(on_nan="roll back", most=2, window=LEAST_STEPS))
    for _ in range(4):
        assert observer.judge(1, NAN, 1.0).action == "roll back"
        judged(observer, usual(LEAST_STEPS))


def test_an_observer_that_goes_on_judges_as_one_that_never_ended():
    health = Health(on_spike="halt", spike_size=10.0)
    first, second = Observer(health), Observer(health)
    judged(first, usual(30))
    second.restore(first.state())
    later = [3.01, 3.02, 2.99, 8.0]
    assert judged(first, later, 31) == judged(second, later, 31) == ["go on"] * 3 + ["halt"]
    assert first.state() == second.state()


def test_a_step_without_finite_numbers_changes_nothing_but_the_count():
    def state(value, step):
        tree = {"a": jnp.full((3,), value), "b": jnp.full((), value)}
        return TrainState(tree, {"bias": jnp.full((2,), value)}, (tree,), jnp.int32(step))

    report = StepReport(*(jnp.float32(1),) * len(StepReport._fields))
    before, after = state(1.0, 4), state(2.0, 5)
    keep = jax.jit(kept_if_finite)
    fine = keep(before, after, report)
    for bad in (report._replace(loss=jnp.float32(NAN)), report._replace(grad_norm=jnp.float32(np.inf))):
        kept = keep(before, after, bad)
        assert int(kept.step) == 5
        for got, want in zip(jax.tree.leaves(kept[:3]), jax.tree.leaves(before[:3]), strict=True):
            np.testing.assert_array_equal(got, want)
    for got, want in zip(jax.tree.leaves(fine), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(got, want)


HANGS = """
import pathlib, sys, time
from dsv4_jax.training.watchdog import Watchdog

def waiting_for_ever():
    time.sleep(60)

with Watchdog(0.4, pathlib.Path(sys.argv[1])) as watchdog:
    for _ in range(4):
        time.sleep(0.2)
        watchdog.beat("step 7 was started")
    if sys.argv[2] == "hang":
        waiting_for_ever()
"""


def test_a_hang_ends_with_the_stacks_and_its_own_code(tmp_path):
    stacks = tmp_path / "stacks.txt"
    start = time.monotonic()
    line = [sys.executable, "-c", HANGS, str(stacks)]
    ended = subprocess.run([*line, "hang"], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 75 and time.monotonic() - start < 50
    for text in (ended.stderr, stacks.read_text()):
        assert "no sign of life" in text and "step 7 was started" in text and "waiting_for_ever" in text
    assert subprocess.run([*line, "go"], timeout=50).returncode == 0
