"""The live display: arithmetic of speed and remaining time, and what a log gets."""

import io

import pytest
from rich.console import Console

from dsv4_jax.training.progress import Pace, TrainingDisplay, clock


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01"), (-3, "0:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_speed_leaves_out_the_first_step_which_compiles():
    times = iter([100.0, 102.0, 104.0])
    pace = Pace(num_steps=13, tokens_per_step=500, now=lambda: next(times))
    assert "compiling" in pace.describe()
    pace.advance(6.0)
    assert pace.describe() == "loss 6.000"
    pace.advance(5.0)
    pace.advance(4.0)
    assert pace.seconds_per_step == 2.0
    assert pace.describe() == "loss 5.000  250 tokens/s  ETA 0:20"


def test_shown_loss_follows_a_change_within_tens_of_steps():
    pace = Pace(200, 1, now=lambda: 0.0)
    for step in range(160):
        pace.advance(6.0 if step < 80 else 2.0)
    assert 2.0 < pace.loss < 2.2


def test_a_log_gets_plain_lines_for_the_first_and_last_step():
    text = io.StringIO()
    with TrainingDisplay(3, 10, Console(file=text, width=100)) as display:
        for loss in (3.0, 2.0, 1.0):
            display.advance(loss)
    lines = text.getvalue().splitlines()
    assert lines[0] == "compiling the training step"
    assert lines[1] == "step 1/3  loss 3.000"
    assert lines[-1].startswith("step 3/3  loss 2.000") and "tokens/s  ETA 0:00" in lines[-1]
    assert "\x1b" not in text.getvalue()


def test_a_terminal_gets_a_bar_with_loss_speed_and_remaining_time():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with TrainingDisplay(2, 10, console) as display:
        display.advance(3.0)
        display.advance(2.0)
    shown = text.getvalue()
    assert "\x1b" in shown and "2/2" in shown and "loss 2.500" in shown
    assert "tokens/s" in shown and "ETA" in shown
