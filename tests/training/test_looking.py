"""What a run shows: pictures, the live panel, lines of a log, records and event files."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from dsv4_jax.training.live import BARS, Shown, Speed, load_bars
from dsv4_jax.training.metrics import RecordFile, goodput_share, read_lines
from dsv4_jax.training.mixing_gain import gains
from dsv4_jax.training.plots import draw_run, smoothed
from dsv4_jax.training.telling import Spoken


def record(step, **changes):
    numbers = {"step": step, "stage": step // 30, "tokens": 100, "loss": 4.0 / step, "main": 3.0 / step}
    more = {"mtp": 4.0 / step, "grad_norm": 1.0, "rate_learning_rate": 0.1, "rate_mtp": 0.3, "seconds": 0.5}
    return numbers | more | changes


LOADS = np.array([[4, 4, 4, 4], [16, 0, 0, 0]], np.float32)


def test_gains_of_products():
    rng = np.random.default_rng(0)
    mixings = [rng.random((3, 3, 2, 5)) for _ in range(3)]
    found = gains(mixings)
    for token in np.ndindex(2, 5):
        matrices = [each[(slice(None), slice(None), *token)] for each in mixings]
        streams = np.ones(3)  # the largest sum over inputs is reached by equal streams
        for matrix in matrices:
            streams = streams @ matrix
        expected = np.abs(matrices[0] @ matrices[1] @ matrices[2]).sum(axis=0).max()
        np.testing.assert_allclose(streams.max(), expected)
    np.testing.assert_allclose(found.forward[0], np.mean(mixings[0].sum(axis=0).max(axis=0)))
    np.testing.assert_allclose(found.backward[2], np.mean(mixings[2].sum(axis=1).max(axis=0)))
    product = np.einsum("ijbt,jkbt,klbt->ilbt", *mixings)
    np.testing.assert_allclose(found.forward_through[2], np.mean(product.sum(axis=0).max(axis=0)))
    np.testing.assert_allclose(found.backward_through[0], np.mean(product.sum(axis=1).max(axis=0)))
    assert found.forward_through[0] == found.forward[0]
    assert found.backward_through[2] == found.backward[2]
    assert gains([]).forward.size == 0


@pytest.mark.parametrize("count", [1, 2, 59, 1601])
def test_smoothed_lines_keep_the_mean(count):
    x, y = np.arange(count, dtype=float), np.random.default_rng(0).standard_normal(count)
    few_x, few_y = smoothed(x, y)
    assert len(few_x) == len(few_y) <= min(count, 401) and few_x[-1] <= x[-1]
    if count < 40:
        np.testing.assert_array_equal(few_y, y)


def test_every_picture_is_drawn_from_the_records(tmp_path):
    file = RecordFile(tmp_path / "metrics.jsonl")
    for step in range(1, 61):
        bad = step == 7  # a step without numbers, as it is written
        file.write(
            record(step, loss=float("nan") if bad else 1.0, rate_mtp=0.3 if step < 40 else 0.1)
            | {"imbalance": [1.0, 4.0], "loads": LOADS.tolist()}
        )
    file.write({"step": 60, "validation_loss": 1.5})
    file.close()
    mixing = gains([np.full((4, 4, 1, 2), 0.25)] * 4)
    drawn = draw_run(tmp_path, mixing, "a title")
    assert [path.name for path in drawn] == [
        "loss.png", "rates.png", "gradients.png", "experts.png", "mixing.png"
    ]  # fmt: skip
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(p.name for p in drawn)


def test_pictures_of_which_there_is_nothing_are_left_out(tmp_path):
    assert draw_run(tmp_path) == []
    file = RecordFile(tmp_path / "metrics.jsonl")
    file.write(record(1))
    file.close()
    assert [path.stem for path in draw_run(tmp_path)] == ["loss", "rates", "gradients"]


def test_speed_counts_neither_the_first_step_nor_what_was_before():
    speed = Speed(20, 2000, flops_per_token=3e6, peak_flops=1e9)
    assert speed.words() == "loss nan" and speed.seconds_left is None
    speed.restart(10)
    speed.step(record(11, seconds=99.0))
    assert speed.tokens_per_second is None
    for step in range(12, 16):
        speed.step(record(step))
    assert speed.tokens_per_second == pytest.approx(200.0)
    assert speed.mfu == pytest.approx(200 * 3e6 / 1e9)
    assert speed.seconds_left == pytest.approx(500 / 200)
    assert "200 tokens/s  MFU 60.0 %  ETA 0:02" in speed.words()
    assert Speed(20, 2000, None, None).mfu is None


def test_a_loss_that_is_none_does_not_stay_in_the_shown_mean():
    speed = Speed(20, 2000, None, None)
    for step, loss in ((1, 2.0), (2, float("nan")), (3, 2.0)):
        speed.step(record(step, main=loss))
    assert speed.loss == pytest.approx(2.0)


def test_bars_of_expert_loads():
    assert load_bars(np.ones((3, 5))) == BARS[4] * 5
    assert load_bars(LOADS) == BARS[-1] + BARS[2] * 3
    assert len(load_bars(np.ones((1, 384)))) == 64
    assert load_bars(np.zeros((1, 3))) == BARS[0] * 3


def shown(terminal):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, _environ={})
    return Shown(console, 4, Speed(4, 400, None, None), every=1), text


def test_a_log_gets_lines():
    display, text = shown(False)
    with display:
        for step in range(1, 5):
            display.step(record(step), LOADS)
        display.validated(4, 1.25)
        display.say("a word")
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("step 1/4  loss 3.000") and "gradient 1  rate 1.00e-01  memory" in lines[0]
    assert lines[-3].startswith("step 4/4") and "tokens/s" in lines[-3]
    assert lines[-2:] == ["step 4: validation loss 1.2500 nats per token", "a word"]


def test_a_terminal_gets_a_panel():
    display, text = shown(True)
    with display:
        for step in range(1, 4):
            display.step(record(step), LOADS)
        display.validated(3, 1.25)
    panel = text.getvalue()
    for part in ("step 3/4", "tokens/s", "validation 1.2500", f"experts {BARS[-1]}", "ETA"):
        assert part in panel


class Mute:
    """A display that shows nothing."""

    def __getattr__(self, name):
        return lambda *given: None


def test_records_events_and_tensorboard(tmp_path):
    teller = Spoken(tmp_path, Mute(), tensorboard=True, every=2)
    for step in (1, 2):
        teller.step(record(step), LOADS)
    teller.validated(2, 1.5, "def f():")
    teller.event("saved", 2, "words")
    teller.close()
    first, second, validated = read_lines(tmp_path / "metrics.jsonl")
    assert first["imbalance"] == [1.0, 4.0] and "loads" not in first
    assert second["loads"] == [[4, 4, 4, 4], [16, 0, 0, 0]]
    assert validated == {"step": 2, "validation_loss": 1.5}
    kinds = [event["kind"] for event in read_lines(tmp_path / "events.jsonl")]
    assert kinds == ["sample", "saved"]
    events = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    data = events[0].read_bytes()
    assert b"validation_loss" in data and b"grad_norm" in data and b"def f():" in data


def test_tensorboard_is_imported_only_when_asked(tmp_path):
    import sys

    before = sys.modules.pop("tensorboardX", None)
    teller = Spoken(tmp_path, Mute(), tensorboard=False, every=1)
    teller.step(record(1), None)
    teller.close()
    assert "tensorboardX" not in sys.modules
    if before is not None:
        sys.modules["tensorboardX"] = before


def test_records_are_exact_and_survive_a_cut(tmp_path):
    file = RecordFile(tmp_path / "m.jsonl")
    exact = float(np.float32(1 / 3))
    file.write({"step": 1, "loss": exact, "bad": float("inf"), "many": [float("nan"), 1.0]})
    file.write({"step": 2, "loss": 1.0})
    file.close()
    with open(tmp_path / "m.jsonl", "ab") as raw:
        raw.write('{"step": 3, "loss": "ü'.encode()[:-1])
    assert read_lines(tmp_path / "m.jsonl")[0] == {"step": 1, "loss": exact, "bad": None, "many": [None, 1.0]}
    assert file.keep_steps(1) == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1]
    assert (
        read_lines(tmp_path / "none.jsonl") == [] and RecordFile(tmp_path / "none.jsonl").keep_steps(0) == 0
    )


def test_goodput_of_sessions(tmp_path):
    path = tmp_path / "goodput.jsonl"
    lines = [
        {"session": "a", "wall": 5.0, "seconds": {"steps": 4.0}, "steps": 4, "repeated_steps": 0},
        {"session": "a", "wall": 10.0, "seconds": {"steps": 8.0}, "steps": 8, "repeated_steps": 0},
        {"session": "b", "wall": 10.0, "seconds": {"steps": 8.0}, "steps": 8, "repeated_steps": 4},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert goodput_share(path) == pytest.approx(16 * (1 - 4 / 16) / 20)
    assert goodput_share(tmp_path / "none") == 0.0
