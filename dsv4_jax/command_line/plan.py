"""`dsv4 plan`: what a slice nobody has rented yet would do with a model."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dsv4_jax.command_line import devices
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.command_line.start import AllowLinks, Json, Mesh, require
from dsv4_jax.errors import ProblemsError

if TYPE_CHECKING:
    from dsv4_jax.config import ModelConfig

Model = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="MODEL", help="flash, pro, a config.json, or a directory with one"),
]
SliceName = Annotated[
    str, tyro.conf.arg(name="slice", metavar="KIND:SIDES", help="such as v6e:4x8, v5p:4x4x4, tpu7x:2x2x1")
]
CompileStep = Annotated[bool, tyro.conf.arg(name="compile")]
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
    optimizer: Literal["muon", "adamw"] = "muon",
    draft: Literal["none", "mtp", "dspark"] = "none",
    tokens_a_pass: float = 1.0,
    usd_per_chip_hour: float | None = None,
    utilisation: float = 0.5,
    compile_step: CompileStep = False,
    plot: Path | None = None,
    allow_links: AllowLinks = None,
    as_json: Json = False,
) -> None:
    """Show what a model would take on a TPU slice: memory, step time, tokens a second, money.

    Computed from shapes, published rates and stated shares of them; nothing is measured, and no device is
    needed. A job that does not fit is refused, exit code 2, with what would fit. With --compile the TPU
    compiler makes the step for the slice, and its figures stand beside the formulas.

    examples:
      dsv4 plan flash --slice v6e:4x8 --work decode --batch 64 --context 65536
      dsv4 plan pro --slice tpu7x:2x2x4 --auto
      dsv4 plan flash --slice v6e:4x8 --work prefill --chunk 4096 --mesh expert=16,tensor=2
      dsv4 plan config.json --slice v5p:4x4x4 --work train --length 4096 --json
      dsv4 plan flash --slice v6e:4x4 --usd-per-chip-hour 2.7 --utilisation 0.5
      dsv4 plan flash --slice v6e:4x8 --mesh expert=16,tensor=2 --compile

    Args:
        work: what a step does: one token a row, a chunk of every prompt, or an update.
        batch: rows over the whole slice.
        context: tokens of a row for which the cache has room and which are in it; 65536 if not given.
        chunk: tokens of a row that one step of prefill appends.
        length: tokens of a packed row in training; 4096 if not given.
        auto: try meshes, and formats of the cache if none is given, and take the fastest that fits.
        cache: format of the cache; fp8+mxfp4 if neither this nor --auto is given.
        weights: how they are held for inference; training has float32 masters.
        optimizer: of training: Muon for matrices and AdamW for the rest, or AdamW for all.
        draft: who guesses further tokens in decode.
        tokens_a_pass: tokens that a decode step appends to a row on average.
        usd_per_chip_hour: also what a million tokens cost, at this price of a chip.
        utilisation: share of the rented time in which such steps run.
        compile_step: also compile the step for the slice, which takes minutes; needs libtpu (extra `plan`).
        plot: a folder for pictures: memory by kind, roofline, tokens a second over rows, cost over context.
    """
    if compile_step:  # for chips that are not here: JAX's own backend is the CPU, whatever else is installed
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    require(devices.settings_problem)  # no device: everything is computed from shapes
    from dsv4_jax.command_line import plan_tables
    from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
    from dsv4_jax.planning import compiled as compiled_of
    from dsv4_jax.planning import described, plots, search, slices
    from dsv4_jax.planning import money as money_of
    from dsv4_jax.planning import plan as planning
    from dsv4_jax.planning.job import Job

    place, problems = slices.parse_slice(slice_name)
    if auto and mesh is not None:
        problems.append(f"--auto: looks for a mesh, and --mesh {mesh} gives one")
    if work == "train" and context is not None:
        problems.append(f"--context {context}: training has --length")
    if work != "train" and length is not None:
        problems.append(f"--length {length}: only training has it; {work} has --context")
    if work != "train" and optimizer != "muon":
        problems.append(f"--optimizer {optimizer}: only training has one, not {work}")
    if place is None or problems:
        raise ProblemsError("cannot plan that", problems)
    tokens = (4096 if length is None else length) if work == "train" else context
    job = Job(
        _config(checkpoint, allow_links), place, work, batch, 65536 if tokens is None else tokens,
        mesh or "data=1", chunk, cache or "fp8+mxfp4", weights, draft, tokens_a_pass, optimizer,
    )  # fmt: skip
    if compile_step:
        described.devices(place)  # refuses before anything long begins
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
        others = search.front(job, formats, {each: None for each in (*smaller, place)}, search.batches(job))
    if not made.fits and not (compile_step and made.fits_without_estimates):
        raise planning.refusal(made, search.smallest(made.job, formats))
    cost = None
    if usd_per_chip_hour is not None:
        cost = money_of.money(made, usd_per_chip_hour, utilisation, checkpoint)
    found = None
    if compile_step:
        note(f"compiling {made.job.work} for {made.job.slice}, mesh {made.job.mesh}: takes minutes")
        found = compiled_of.compiled(made.job)
    pictures = [] if plot is None else plots.drawn(made, plot, found)
    if as_json:
        plain: dict[str, Any] = made.to_json() | {"why_this_mesh": why}
        if auto:
            plain["front"] = [each.to_json() for each in others]
        if cost is not None:
            plain["money"] = cost.to_json()
        if found is not None:
            plain["compiled"] = found.to_json()
            plain["basis"] = planning.COMPILED_BASIS
        if pictures:
            plain["pictures"] = [str(each) for each in pictures]
        print(json.dumps(plain))
        return
    plan_tables.show(made, why, others, cost, checkpoint, found)
    for each in pictures:
        note(f"wrote {each}")


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
