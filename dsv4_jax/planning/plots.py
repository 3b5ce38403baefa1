"""Pictures of a plan: what a device holds, the roofs of its chip, tokens over rows, cost over context."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_jax.inspection.context_cost import (
    GQA_BYTES_PER_LAYER,
    V32_BYTES_PER_TOKEN,
    token_flops,
    v32_flops,
)
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from dsv4_jax.planning.held import row_bytes
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.plan import Plan, plan

if TYPE_CHECKING:
    from dsv4_jax.planning.compiled import Compiled

DPI = 120
KINDS = ("weights", "optimizer", "gradients", "cache", "state", "temporaries")
COLORS = dict(zip(KINDS, ("#355070", "#6d597a", "#b56576", "#2a9d8f", "#8ab17d", "#e9c46a"), strict=True))
PARTS = {
    "dense products": (("dense products", "head"), ("dense weights",)),
    "experts": (("expert products",), ("experts",)),
    "attention and indexer": (("attention", "indexer"), ("cache",)),
}
"""Name -> (kinds of FLOPs, kinds of HBM bytes) that belong together."""

MOST_ROWS = 4096
LONGEST = 2**20


def drawn(made: Plan, folder: Path, found: "Compiled | None" = None) -> list[Path]:
    """Draws what there is to draw and writes PNGs: hbm, roofline, rows and, for inference, context.

    Args:
        made: the plan.
        folder: where; made if it is not there.
        found: what the compiler says of the step, if it was asked: a second bar of memory.

    Returns:
        The files, of 960 x 540 pixels each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any], None]] = {
        "hbm": lambda figure: draw_memory(figure, made, found),
        "roofline": lambda figure: draw_roofline(figure, made),
        "rows": lambda figure: draw_rows(figure, made),
        "context": lambda figure: draw_context(figure, made.job),
    }
    if made.job.work == "train":
        del pictures["context"]
    return [_written(folder / f"{name}.png", draw, made) for name, draw in pictures.items()]


def _written(path: Path, draw: Callable[[Any], None], made: Plan) -> Path:
    from matplotlib.figure import Figure  # slow to import, and needed by few

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure)
    job = made.job
    about = f"{job.slice}, {job.mesh}, {job.work}: {job.batch} rows of {job.context:,} tokens"
    if path.stem != "context":
        figure.suptitle(f"{about}. Computed, not measured.", fontsize=10, color="0.35")
    incoming = path.with_name(f".{path.name}")
    figure.savefig(incoming, dpi=DPI, format="png")
    incoming.replace(path)
    return path


def memory_bars(made: Plan, found: "Compiled | None" = None) -> dict[str, dict[str, float]]:
    """Bar -> kind -> GiB: by formula, and by the compiler if it was asked. Padding of its arguments counts
    as temporaries of the compiler, as do gradients."""
    bars = {"by formula": {name: size / 2**30 for name, size in dataclasses.asdict(made.held).items()}}
    if found is not None:
        kinds = {name: size / 2**30 for name, size in found.arguments.items()}
        kinds["temporaries"] = found.held_bytes / 2**30 - sum(kinds.values())
        bars["by the compiler"] = kinds
    return bars


def draw_memory(figure: Any, made: Plan, found: "Compiled | None" = None) -> None:
    """What a device holds, by kind, against what a program may use; on an empty figure of matplotlib."""
    axes, limit = figure.subplots(), made.limit / 2**30
    bars = memory_bars(made, found)
    for at, parts in enumerate(bars.values()):
        left = 0.0
        for kind in KINDS:
            size = parts.get(kind, 0.0)
            if not size:
                continue
            label = kind if not any(kind in earlier for earlier in list(bars.values())[:at]) else None
            axes.barh(at, size, left=left, color=COLORS[kind], label=label, height=0.6)
            if size > 0.06 * limit:
                axes.text(left + size / 2, at, f"{size:.2f}", ha="center", va="center", color="white")
            left += size
        axes.text(left + 0.01 * limit, at, f"{left:.2f}", va="center", color="0.3")
    axes.axvline(limit, color="black", lw=1.2, ls="--")
    axes.annotate(
        f"a program may use {limit:.2f} ", (limit, 1.0), xycoords=("data", "axes fraction"),
        ha="right", va="top", fontsize=9,
    )  # fmt: skip
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(-1.0, len(bars) - 0.1)
    axes.set(xlabel="GiB of one device", title="What a device holds")
    axes.legend(loc="lower left", fontsize=8, ncols=6)


def roofline_points(made: Plan) -> dict[str, tuple[float, float]]:
    """Part of the step -> (FLOPs, bytes of HBM) of one device; those without either are left out."""
    asked = made.demand
    points = {
        name: (_sum(asked.flops, flops), _sum(asked.hbm_bytes, moved))
        for name, (flops, moved) in PARTS.items()
    }
    points["the whole step"] = (sum(asked.flops.values()), sum(asked.hbm_bytes.values()))
    return {name: both for name, both in points.items() if all(both)}


def _sum(amounts: dict[str, float], kinds: tuple[str, ...]) -> float:
    return sum(amounts.get(kind, 0.0) for kind in kinds)


def draw_roofline(figure: Any, made: Plan) -> None:
    """The parts of a step under the roof of its chip, and the range of the whole step."""
    axes, chip = figure.subplots(), made.job.slice.chip
    points = roofline_points(made)
    ridge = chip.bf16_flops / chip.hbm_bytes_per_second
    intensities = [flops / size for flops, size in points.values()]
    ends = np.array([min(*intensities, ridge) / 4, max(*intensities, ridge) * 4])
    xs = np.geomspace(*ends, 200)
    axes.loglog(xs, np.minimum(chip.bf16_flops, xs * chip.hbm_bytes_per_second) / 1e12, color="0.2", lw=1.5)
    for (name, (flops, size)), x in zip(points.items(), intensities, strict=True):
        roof = chip.seconds(flops, size)
        bold = {"marker": "*", "s": 160} if name == "the whole step" else {"marker": "o", "s": 50}
        axes.scatter(
            [x], [flops / roof / 1e12], label=f"{name}: at least {1e3 * roof:.3g} ms", zorder=3, **bold
        )
    slow, fast = (sum(made.demand.flops.values()) / t / 1e12 for t in (made.time.longest, made.time.shortest))
    whole = points["the whole step"]
    axes.plot(
        [whole[0] / whole[1]] * 2, [slow, fast], color="0.4", lw=4, alpha=0.4, label="range of the step"
    )
    axes.axvline(ridge, color="0.7", lw=0.8, ls=":")
    axes.set(
        xlabel="FLOPs for each byte of HBM", ylabel="TFLOPs a second, one device",
        title=f"Roof of {made.job.slice.kind}: {chip.bf16_flops / 1e12:.0f} TFLOPs a second in bf16, "
        f"{chip.hbm_bytes_per_second / 1e9:.0f} GB/s",
    )  # fmt: skip
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.2, which="both")


def over_rows(made: Plan) -> list[Plan]:
    """Plans of the same job with 1, 2, 4, ... rows, to the most that fit; training keeps to multiples of the
    ways that split its rows."""
    found, rows = [], 1
    while rows <= MOST_ROWS:
        each = plan(dataclasses.replace(made.job, batch=rows))
        if not each.fits:
            break
        found.append(each)
        rows *= 2
    return found


def draw_rows(figure: Any, made: Plan) -> None:
    """Tokens a second of the slice, and the step, over rows."""
    axes, plans = figure.subplots(), over_rows(made)
    if not plans:
        axes.text(0.5, 0.5, "not even one row fits", ha="center", transform=axes.transAxes)
        return
    rows = [each.job.batch for each in plans]
    low, high = np.array([each.tokens_a_second_a_chip for each in plans]).T
    chips = made.job.slice.chips
    axes.fill_between(rows, low * chips, high * chips, color="#2a9d8f", alpha=0.25, label="range")
    axes.plot(
        rows, np.sqrt(low * high) * chips, color="#2a9d8f", marker="o", ms=4, label="middle of the range"
    )
    other = axes.twinx()
    middle = [1e3 * each.time.middle for each in plans]
    other.plot(rows, middle, color="#b56576", ls="--", marker="s", ms=3, label="step, ms (right)")
    other.set(ylabel="step, ms, middle of its range", ylim=(0, 1.1 * max(middle)))
    axes.set(
        xlabel="rows over the slice", ylabel="tokens a second, whole slice", xscale="log", yscale="log",
        title="Tokens a second over rows, to the most that fit",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    lines = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="upper left")
    axes.grid(alpha=0.2)


def cache_lines(job: Job, contexts: Sequence[int]) -> dict[str, list[float]]:
    """Name -> bytes of one sequence at each context: of this model as its arrays are allocated, rings of
    recent rows included, in each format; of DeepSeek-V3.2 and of a plain cache of 8 key-value heads the
    entries alone."""
    lines = {}
    for form in CACHE_FORMATS:
        rows = [row_bytes(dataclasses.replace(job, cache=form, context=each)) for each in contexts]
        name = "bf16" if form == "plain" else form
        lines[f"this model, {name}"] = [float(row.entries + row.state) for row in rows]
    layers = job.config.num_hidden_layers
    lines["DeepSeek-V3.2, fp8"] = [float(V32_BYTES_PER_TOKEN * each) for each in contexts]
    lines["GQA, 8 heads of 128, bf16"] = [float(GQA_BYTES_PER_LAYER * layers * each) for each in contexts]
    return lines


def draw_context(figure: Any, job: Job) -> None:
    """Bytes of one sequence's cache and work of one token over the context, beside V3.2 and a plain cache."""
    config = job.config
    longest = min(LONGEST, config.max_position_embeddings)
    contexts = [
        int(each) for each in np.unique(np.geomspace(max(1, longest / 1024), longest, 33).astype(int))
    ]
    memory, flops = figure.subplots(1, 2)
    for name, sizes in cache_lines(job, contexts).items():
        style = {"lw": 1.8} if name.startswith("this") else {"lw": 1.4, "ls": "--"}
        memory.loglog(contexts, np.array(sizes) / 2**30, label=f"{name}: {sizes[-1] / 2**30:.3g}", **style)
    memory.set(xlabel="tokens of context", ylabel="GiB of one sequence", title="Cache, as it is allocated")
    ours = [token_flops(config, each).total / 1e9 for each in contexts]
    flops.loglog(contexts, ours, label=f"this model: {ours[-1]:.4g}", lw=1.8)
    theirs = [v32_flops(each).total / 1e9 for each in contexts]
    flops.loglog(contexts, theirs, label=f"DeepSeek-V3.2: {theirs[-1]:.4g}", lw=1.4, ls="--")
    flops.set(xlabel="tokens of context", ylabel="GFLOP of one decoded token", title="Work of one token")
    for axes in (memory, flops):
        axes.legend(fontsize=7, loc="upper left", title=f"at {longest:,} tokens", title_fontsize=7)
        axes.grid(alpha=0.2)
