"""`dsv4 plan`: what a slice nobody has rented yet would do with a model."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dsv4_jax.command_line import devices
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.command_line.start import AllowLinks, Json, Mesh, require
from dsv4_jax.errors import ProblemsError

if TYPE_CHECKING:
    from dsv4_jax.config import ModelConfig
    from dsv4_jax.planning.money import Money
    from dsv4_jax.planning.plan import Plan

Model = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="MODEL", help="flash, pro, a config.json, or a directory with one"),
]
SliceName = Annotated[
    str, tyro.conf.arg(name="slice", metavar="KIND:SIDES", help="such as v6e:4x8, v5p:4x4x4, tpu7x:2x2x1")
]
Cache = Literal["plain", "fp8+fp8", "fp8+mxfp4"]


def plan(
    checkpoint: Model,
    slice_name: SliceName,
    work: Literal["decode", "prefill", "train"] = "decode",
    batch: int = 64,
    context: int | None = None,
    chunk: int = 2048,
    length: int | None = None,
    mesh: Mesh = None,
    auto: bool = False,
    cache: Cache | None = None,
    weights: Literal["native", "bfloat16"] = "native",
    draft: Literal["none", "mtp", "dspark"] = "none",
    tokens_a_pass: float = 1.0,
    usd_per_chip_hour: float | None = None,
    utilisation: float = 0.5,
    allow_links: AllowLinks = None,
    as_json: Json = False,
) -> None:
    """Show what a model would take on a TPU slice: memory, step time, tokens a second, money.

    Computed from shapes, published rates and stated shares of them; nothing is measured or compiled, and
    no device is needed. A job that does not fit is refused, exit code 2, with what would fit.

    examples:
      dsv4 plan flash --slice v6e:4x8 --work decode --batch 64 --context 65536
      dsv4 plan pro --slice tpu7x:2x2x4 --auto
      dsv4 plan flash --slice v6e:4x8 --work prefill --chunk 4096 --mesh expert=16,tensor=2
      dsv4 plan config.json --slice v5p:4x4x4 --work train --length 4096 --json
      dsv4 plan flash --slice v6e:4x4 --usd-per-chip-hour 2.7 --utilisation 0.5

    Args:
        work: what a step does: one token a row, a chunk of every prompt, or an update.
        batch: rows over the whole slice.
        context: tokens of a row for which the cache has room and which are in it; 65536 if not given.
        chunk: tokens of a row that one step of prefill appends.
        length: tokens of a packed row in training; 4096 if not given.
        auto: try meshes, and formats of the cache if none is given, and take the fastest that fits.
        cache: format of the cache; fp8+mxfp4 if neither this nor --auto is given.
        weights: how they are held for inference; training has float32 masters.
        draft: who guesses further tokens in decode.
        tokens_a_pass: tokens that a decode step appends to a row on average.
        usd_per_chip_hour: also what a million tokens cost, at this price of a chip.
        utilisation: share of the rented time in which such steps run.
    """
    require(devices.settings_problem)  # no device: everything is computed from shapes
    from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
    from dsv4_jax.planning import money as money_of
    from dsv4_jax.planning import plan as planning
    from dsv4_jax.planning import search, slices
    from dsv4_jax.planning.job import Job

    place, problems = slices.parse_slice(slice_name)
    if auto and mesh is not None:
        problems.append(f"--auto: looks for a mesh, and --mesh {mesh} gives one")
    if work == "train" and context is not None:
        problems.append(f"--context {context}: training has --length")
    if work != "train" and length is not None:
        problems.append(f"--length {length}: only training has it; {work} has --context")
    if place is None or problems:
        raise ProblemsError("cannot plan that", problems)
    tokens = (4096 if length is None else length) if work == "train" else context
    job = Job(
        _config(checkpoint, allow_links), place, work, batch, 65536 if tokens is None else tokens,
        mesh or "data=1", chunk, cache or "fp8+mxfp4", weights, draft, tokens_a_pass,
    )  # fmt: skip
    formats = CACHE_FORMATS if auto and cache is None and work != "train" else (job.cache,)
    why = "as given"
    if mesh is None:
        job = dataclasses.replace(job, mesh=search.default_mesh(job))
        why = "by default the most expert parallelism that fits: experts are most of the weights"
    made, others = planning.plan(job), []
    if auto:
        why = "the shortest step, by the middle of its range, of the meshes that fit"
        made = search.best(job, formats) or made
        smaller = slices.rented_slices(place.kind, place.chips)
        others = search.front(job, formats, {each: None for each in (*smaller, place)})
    if not made.fits:
        raise planning.refusal(made, search.smallest(made.job, formats))
    cost = None
    if usd_per_chip_hour is not None:
        cost = money_of.money(made, usd_per_chip_hour, utilisation, checkpoint)
    if as_json:
        plain: dict[str, Any] = made.to_json() | {"why_this_mesh": why}
        if auto:
            plain["front"] = [each.to_json() for each in others]
        if cost is not None:
            plain["money"] = cost.to_json()
        print(json.dumps(plain))
        return
    _print(made, why, others, cost, checkpoint)


def _config(checkpoint: str, allow_links: Any) -> "ModelConfig":
    """Of a released model by name, or of a file; a path of that name goes first, as with `inspect`."""
    from dsv4_jax.command_line import hub
    from dsv4_jax.config import io as config_io
    from dsv4_jax.inspection import costs

    path = hub.locate(checkpoint, weights=False, announce=note)
    if checkpoint in costs.PRESETS and not path.exists():
        return costs.PRESETS[checkpoint]()
    file = config_io.read_config_file(path, text_only=True, allow_links=allow_links)
    for remark in file.notes:
        note(f"note: {remark}")
    return file.config


def _print(made: "Plan", why: str, others: list["Plan"], cost: "Money | None", name: str) -> None:
    """The tables of a plan."""
    from rich.table import Table

    from dsv4_jax.command_line import terminal
    from dsv4_jax.planning.plan import BASIS

    job, console = made.job, terminal.Tables()
    what = f"{job.batch} rows of {job.context} tokens"
    table = Table(title=f"{name} on {job.slice} ({job.slice.chips} chips), {job.work}: {what}")
    table.add_column("of one device")
    table.add_column("by formula", justify="right")
    for part, size in dataclasses.asdict(made.held).items():
        if size:
            table.add_row(f"{part}, GiB" + (" (estimate)" if part == "temporaries" else ""), _gib(size))
    table.add_row(
        "together, of what a program may use, GiB", f"{_gib(made.held.total)} of {_gib(made.limit)}"
    )
    table.add_section()
    for part, amount in made.demand.flops.items():
        table.add_row(f"{part}, GFLOP a step", f"{amount / 1e9:.3f}")
    for part, amount in made.demand.hbm_bytes.items():
        table.add_row(f"HBM: {part}, GiB a step", _gib(amount))
    for axes, amount in made.link_bytes_by_axes.items():
        table.add_row(f"links: along {axes}, GiB a step", _gib(amount))
    table.add_section()
    for resource, seconds in made.time.floors.items():
        bound = " (the highest)" if resource == made.time.bound else ""
        table.add_row(f"floor of {resource}{bound}, ms", f"{1e3 * seconds:.3f}")
    table.add_row("step, ms", _range(1e3 * made.time.shortest, 1e3 * made.time.longest))
    table.add_row("tokens a second a chip", _range(*made.tokens_a_second_a_chip))
    table.add_row("model FLOPs of the bf16 peak (MFU), %", _range(*(100 * x for x in made.model_flops_share)))
    table.add_row("HBM bytes of its rate, %", _range(*(100 * x for x in made.hbm_share)))
    table.add_section()
    table.add_row(f"largest batch at {job.context} tokens", str(made.largest_batch))
    table.add_row(f"largest context at {job.batch} rows", str(made.largest_context))
    if cost is not None:
        table.add_section()
        table.add_row("dollars of a million tokens", _range(cost.least, cost.most))
        if cost.published is not None and cost.break_even is not None:
            table.add_row("the published API asks, dollars", f"{cost.published:.2f}")
            table.add_row("break-even, dollars a chip and hour", _range(*cost.break_even))
    console.print(table)
    console.print(f"mesh {job.mesh}: {why}. cache {job.cache}, weights {job.weights}.")
    if others:
        table = Table(
            title=f"{job.slice.kind} slices up to this one that no other beats, middle of the ranges"
        )
        for column in ("slice", "mesh", "cache", "chips", "step, ms", "tokens/s a chip"):
            table.add_column(column)
        for each in others:
            rate = each.job.useful_tokens / each.job.slice.chips / each.time.middle
            table.add_row(
                str(each.job.slice), each.job.mesh, each.job.cache, str(each.job.slice.chips),
                f"{1e3 * each.time.middle:.2f}", f"{rate:.1f}",
            )  # fmt: skip
        console.print(table)
    console.print(BASIS)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f}"


def _range(low: float, high: float) -> str:
    return f"{low:.4g} to {high:.4g}"
