"""Pictures of a run, from its metrics: loss, rates, gradient norms, expert loads, mHC gains."""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv4_jax.training.metrics import METRICS_FILE, read_lines
from dsv4_jax.training.mixing_gain import Gains

FOLDER = "plots"
DPI = 120
MOST_POINTS = 400
"""Of a smoothed line."""

MOST_COLUMNS = 120
"""Of a heat map over steps."""

WEIGHTS = {
    "rate_mtp": "MTP loss",
    "rate_balance": "balance loss",
    "rate_indexer": "indexer loss",
    "rate_z": "z-loss",
    "rate_bias_speed": "speed of router biases",
}
LEAST_GAIN = 1e-8
"""Added to distances from a gain of 1, so that none is off a logarithmic scale."""


def draw_run(out: pathlib.Path, gains: Gains | None = None, title: str = "") -> list[pathlib.Path]:
    """Writes PNGs below `out/plots`, replacing those that are there.

    Args:
        out: folder of the run.
        gains: of the mHC mixings now; None leaves that picture out.
        title: over each of them.

    Returns:
        The files; a picture of which there is nothing to show is left out.
    """
    records = read_lines(out / METRICS_FILE)
    by_step = {record["step"]: record for record in records if "loss" in record}  # the last one counts
    steps = [by_step[step] for step in sorted(by_step)]
    validations = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    if not steps:
        return []
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    pictures: dict[str, Callable[[Any], bool]] = {
        "loss": lambda figure: _loss(figure, steps, validations),
        "rates": lambda figure: _rates(figure, steps),
        "gradients": lambda figure: _gradients(figure, steps),
        "experts": lambda figure: _experts(figure, steps),
        "mixing": lambda figure: gains is not None and _mixing(figure, gains),
    }
    return [path for name, draw in pictures.items() if (path := _drawn(folder / f"{name}.png", draw, title))]


def _drawn(path: pathlib.Path, draw: Callable[[Any], bool], title: str) -> pathlib.Path | None:
    from matplotlib.figure import Figure  # slow to import, and needed by few runs

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    if not draw(figure):
        return None
    if title:
        figure.suptitle(title, fontsize=10, color="0.35")
    incoming = path.with_name(f".{path.name}")
    figure.savefig(incoming, dpi=DPI, format="png")
    incoming.replace(path)
    return path


def _series(steps: Sequence[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, without those that were no numbers or are missing."""
    pairs = [(record["step"], record[name]) for record in steps if record.get(name) is not None]
    found = np.array(pairs, np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that a long run is a line and not a band."""
    each = max(1, math.ceil(len(x) / MOST_POINTS), min(8, len(x) // 40))
    whole = len(x) // each * each
    parts = [x[:whole].reshape(-1, each).mean(axis=1), y[:whole].reshape(-1, each).mean(axis=1)]
    rest = [x[whole:], y[whole:]]
    if len(rest[0]):
        parts = [np.append(part, left.mean()) for part, left in zip(parts, rest, strict=True)]
    return parts[0], parts[1]


def _line(axes: Any, steps: Sequence[dict], name: str, label: str, color: str) -> bool:
    x, y = _series(steps, name)
    if not len(x):
        return False
    axes.plot(x, y, lw=0.6, color=color, alpha=0.25)
    axes.plot(*smoothed(x, y), lw=1.4, color=color, label=label)
    return True


def _stages(axes: Any, steps: Sequence[dict], height: float = 0.98) -> None:
    """A thin line where a stage begins, with its number at some height of the axes."""
    for before, after in zip(steps[:-1], steps[1:], strict=True):
        if before["stage"] != after["stage"]:
            axes.axvline(after["step"] - 0.5, color="0.7", lw=0.8, ls=":")
            place = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": "0.5", "va": "top"}
            axes.annotate(f" stage {after['stage']}", (after["step"] - 0.5, height), **place)


def _loss(figure: Any, steps: Sequence[dict], validations: dict[int, float | None]) -> bool:
    axes = figure.subplots()
    _line(axes, steps, "mtp", "two tokens ahead (MTP)", "tab:orange")
    _line(axes, steps, "main", "next token", "tab:blue")
    found = [(step, loss) for step, loss in sorted(validations.items()) if loss is not None]
    if found:
        axes.plot(*zip(*found, strict=True), "o-", ms=4, lw=1, color="tab:green", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    _stages(axes, steps)
    _finish(axes)
    return True


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _rates(figure: Any, steps: Sequence[dict]) -> bool:
    """The learning rate, and the weights of the losses that change."""
    changing = [name for name in WEIGHTS if len(set(_series(steps, name)[1])) > 1]
    ratios = [2, 1] if changing else [1]
    upper, *lower = np.atleast_1d(figure.subplots(len(ratios), sharex=True, height_ratios=ratios))
    upper.plot(*_series(steps, "rate_learning_rate"), lw=1.4, color="tab:blue")
    upper.set(ylabel="learning rate", ylim=(0, None))
    _stages(upper, steps, 0.1)
    _finish(upper)
    for axes in lower:
        for name in changing:
            axes.plot(*_series(steps, name), lw=1.4, label=WEIGHTS[name])
        axes.set(ylabel="weight", ylim=(0, None))
        _finish(axes)
    (lower or [upper])[-1].set(xlabel="step")
    return True


def _gradients(figure: Any, steps: Sequence[dict]) -> bool:
    axes = figure.subplots()
    if not _line(axes, steps, "grad_norm", "norm before clipping", "tab:purple"):
        return False
    axes.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    _stages(axes, steps)
    _finish(axes)
    return True


def _experts(figure: Any, steps: Sequence[dict]) -> bool:
    """The last loads of all experts, and how uneven each layer was over time."""
    loads = next((record["loads"] for record in reversed(steps) if record.get("loads")), None)
    uneven = [(record["step"], record["imbalance"]) for record in steps if record.get("imbalance")]
    if loads is None or not uneven:
        return False
    share = np.asarray(loads, np.float64)
    share = share / np.maximum(share.mean(axis=1, keepdims=True), 1e-9)
    left, right = figure.subplots(1, 2)
    image = left.imshow(share, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    figure.colorbar(image, ax=left, label="tokens over an even share", extend="max")
    left.set(xlabel="expert", ylabel="layer", title="load, last recorded step")
    left.locator_params(integer=True)
    over_time = np.array([values for _, values in uneven], np.float64)
    first, last = uneven[0][0], uneven[-1][0]
    rows = _binned(over_time).T
    extent = (first - 0.5, last + 0.5, rows.shape[0] - 0.5, -0.5)
    image = right.imshow(rows, aspect="auto", cmap="viridis", vmin=1, extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=right, label="busiest expert over an even share")
    right.set(xlabel="step", ylabel="layer", title="imbalance")
    right.locator_params(axis="y", integer=True)
    return True


def _binned(rows: np.ndarray) -> np.ndarray:
    """At most `MOST_COLUMNS` means of neighbouring rows."""
    parts = np.array_split(rows, min(len(rows), MOST_COLUMNS))
    return np.array([part.mean(axis=0) for part in parts])


def _mixing(figure: Any, gains: Gains) -> bool:
    """How far gains are from 1, which a doubly stochastic mixing has exactly."""
    if not len(gains.forward):
        return False
    layers = np.arange(len(gains.forward)) / 2  # two sublayers a layer
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, single, together, title in (
        (left, gains.forward, gains.forward_through, "signal: this sublayer, and all up to it"),
        (right, gains.backward, gains.backward_through, "gradient: this sublayer, and all from it on"),
    ):
        axes.plot(layers, np.abs(single - 1) + LEAST_GAIN, "o", ms=4, color="tab:blue", label="alone")
        axes.plot(layers, np.abs(together - 1) + LEAST_GAIN, lw=1.4, color="tab:orange", label="together")
        axes.set(xlabel="layer", yscale="log")
        axes.set_title(title, fontsize=10)
        axes.locator_params(axis="x", integer=True)
        _finish(axes)
    highest = max(float(np.abs(each - 1).max()) for each in gains)
    left.set(ylabel="|gain - 1|, mean over tokens", ylim=(LEAST_GAIN / 2, max(1e-3, 4 * highest)))
    return True
