"""The tables that `dsv4 plan` prints."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from dsv4_jax.planning.compiled import Compiled
    from dsv4_jax.planning.money import Money
    from dsv4_jax.planning.plan import Plan


def show(
    made: "Plan",
    why: str,
    others: list["Plan"],
    cost: "Money | None",
    name: str,
    found: "Compiled | None" = None,
) -> None:
    """Prints a plan.

    Args:
        made: the plan.
        why: it has this mesh.
        others: that no other beats, if they were looked for.
        cost: of a million tokens, if it was asked for.
        name: of the model.
        found: what the compiler says of the step, if it was asked.
    """
    from rich.table import Table

    from dsv4_jax.command_line import terminal
    from dsv4_jax.planning.plan import BASIS, COMPILED_BASIS

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
    if found is not None:
        console.print(_compiled_table(made, found))
        for name_of, size in found.whole.items():
            console.print(f"held whole by every device: {name_of}, {_gib(size)} GiB", highlight=False)
    if others:
        table = Table(
            title=f"{job.slice.kind} slices up to this one that no other beats, middle of the ranges"
        )
        for column in ("slice", "mesh", "cache", "chips", "rows", "step, ms", "tokens/s a chip"):
            table.add_column(column)
        for each in others:
            rate = each.job.useful_tokens / each.job.slice.chips / each.time.middle
            table.add_row(
                str(each.job.slice), each.job.mesh, each.job.cache, str(each.job.slice.chips),
                str(each.job.batch),
                f"{1e3 * each.time.middle:.2f}", f"{rate:.1f}",
            )  # fmt: skip
        console.print(table)
    console.print(BASIS if found is None else COMPILED_BASIS)


def _compiled_table(made: "Plan", found: "Compiled") -> "Table":
    """What the formulas say beside what the compiler does."""
    from rich.table import Table

    held = made.held
    known = held.weights + held.optimizer + held.cache + held.state
    title = f"{made.job.slice}, compiled by libtpu {found.libtpu}: of one device"
    table = Table(title=title)
    for column in ("", "by formula", "by the compiler"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, formula in (
        ("weights", held.weights), ("optimizer", held.optimizer), ("cache", held.cache + held.state)
    ):  # fmt: skip
        if kind in found.arguments:
            named = "cache and state" if kind == "cache" else kind
            table.add_row(f"{named}, GiB", _gib(formula), _gib(found.arguments[kind]))
    table.add_row("all arguments, with padding, GiB", _gib(known), _gib(found.argument_bytes))
    made_and_dropped = "temporaries and gradients" if held.gradients else "temporaries (formula: estimate)"
    table.add_row(
        f"{made_and_dropped}, GiB", _gib(held.temporaries + held.gradients), _gib(found.temporary_bytes)
    )
    table.add_row("results beside arguments, GiB", "", _gib(found.output_bytes - found.alias_bytes))
    together = f"together, of {_gib(made.limit)} GiB"
    table.add_row(together, _gib(held.total), _gib(found.held_bytes))
    table.add_section()
    formula_links = made.link_bytes_by_axes
    for axes in dict.fromkeys((*formula_links, *found.moved_by_axes)):
        said = _gib(formula_links[axes]) if axes in formula_links else ""
        seen = _gib(found.moved_by_axes[axes]) if axes in found.moved_by_axes else ""
        table.add_row(f"along {axes}, GiB (received; results)", said, seen)
    table.add_section()
    total = sum(made.demand.flops.values())
    xla = "" if found.flops is None else f"{found.flops / 1e9:.3f}"
    table.add_row("GFLOP a step (compiler: XLA's, loops once)", f"{total / 1e9:.3f}", xla)
    if found.xla_seconds is not None:
        table.add_row("XLA's own operations, estimated, ms", "", f"{1e3 * found.xla_seconds:.3f}")
    table.add_row("calls of kernels in the program", "", str(found.kernel_calls))
    table.add_row("to lower, s", "", f"{found.lower_seconds:.1f}")
    table.add_row("to compile, s", "", f"{found.compile_seconds:.1f}")
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f}"


def _range(low: float, high: float) -> str:
    return f"{low:.4g} to {high:.4g}"
