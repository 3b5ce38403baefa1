"""What the TPU compiler's own schedule says of every Pallas kernel here. No TPU needed, and nothing is run.

    python -m experiments.tpu_cycles                                     # Flash, all chips, about 15 minutes
    python -m experiments.tpu_cycles --chips v6e --only hyper_connection compressor
    python -m experiments.tpu_cycles --model pro --chips tpu7x --only decode

Each case of `tpu_cases.py` is compiled ahead of time for a described chip, in a process of its own (the
compiler reads its flags once a process), and its dumps are read by `tpu_schedule.py`. Rows are written to
JSON one by one; rows of other cases that are already in the file stay. Needs libtpu (extra `test` or `tpu`).
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.experimental import pallas as pl
from jax.experimental import topologies
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dsv4_jax.config import v4_flash, v4_pro
from experiments.tpu_case import Case, Kernel, Program
from experiments.tpu_cases import cases
from experiments.tpu_schedule import Schedule, analyse
from pallas_kernels.chips import CHIPS

MODELS = {"flash": v4_flash, "pro": v4_pro}
CAVEATS = """\
A compiler's static schedule, not a measurement: nothing ran on a chip, and the clocks are inferred.
Optimistic: starting copies and waiting for them, semaphores, contention and launches cost nothing here.
`pl.when` bodies count as often as the case says; those it says nothing about count in full (JSON: `assumed`).
A loop takes at least the cycles of its matrix products. HBM bytes are those of the block specs (a block moves
when its index changes; one that sticks out counts whole), plus copies by hand where the case names them, and
move at the full published bandwidth. bound = max(compute, HBM). roofline = the contract's Cost section at
peak rates. XLA around = the compiler's estimate for what XLA does before and after the kernels in the same
program (layouts, padding; in a backward row also around the forward kernel); it is no part of the bound.
v5p: one of a device's two cores, which share the parallel grid axes."""


@dataclasses.dataclass(frozen=True)
class Compiler:
    """What the compiler of one chip needs, and how its dumps read.

    Cycles of a `vmatmul` are the capacities of the compiler's own static profile divided by the number of
    matrix units; delay slots are the distance between a jump and the end of its region in every dump.
    """

    topology: str
    delay_slots: int
    cycles_of_product: dict[str, float]


COMPILERS = {
    "v5e": Compiler("v5e:2x2", 4, {"bf16": 4.0, "": 2.0}),
    "v5p": Compiler("v5p:2x2x1", 4, {"bf16": 4.0, "": 2.0}),
    "v6e": Compiler("v6e:2x2", 4, {"f8": 8.0, "s8": 4.0, "bf16": 4.0, "": 2.0}),
    "tpu7x": Compiler("tpu7x:2x2x1", 6, {"f8": 4.0, "s8": 4.0, "bf16": 4.0, "": 2.0}),
}

NO_ESTIMATE = 2**62  # XLA writes the largest int64 where it has none

# Without these libtpu looks for a cloud machine's metadata, and a second process finds the first one's lock.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Operands stay in HBM: XLA would move those of a small program to VMEM, where copies become loops.
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=.*(final_bundles|post-ra|final_hlo-static-per-bundle).* "
    "--xla_msa_enable=false"
)


@dataclasses.dataclass
class Options:
    """What to compile."""

    chips: tuple[Literal["v5e", "v5p", "v6e", "tpu7x"], ...] = ("v6e", "tpu7x", "v5e", "v5p")
    model: Literal["flash", "pro"] = "flash"
    only: tuple[str, ...] = ("",)
    """Parts of the names of the cases wanted."""
    out: Path = Path("experiments/results/tpu_cycles.json")
    """Also names the Markdown table: the same path with `.md`."""
    timeout_seconds: float = 900


# --- HBM traffic from block specs ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """One `pallas_call` as it was made: its grid, and each blocked operand's spec, shape and dtype."""

    name: str
    grid: tuple[int, ...]
    blocked: list[tuple[pl.BlockSpec, Any]]

    def hbm_bytes(self, prefetch: Sequence[np.ndarray]) -> float:
        return sum(block_traffic(spec, operand, self.grid, prefetch) for spec, operand in self.blocked)


def block_traffic(spec: pl.BlockSpec, operand: Any, grid: tuple[int, ...], prefetch: Sequence) -> float:
    """Bytes that the pipeline moves for one operand: a block whenever its index changes between steps."""
    if spec.block_shape is None:
        # Left where it is (copied by hand, if at all), or a whole array that is read once.
        is_left = str(spec.memory_space) in ("any", "hbm", "MemorySpace.ANY", "MemorySpace.HBM")
        return 0.0 if is_left else operand.size * operand.dtype.itemsize
    sizes = [getattr(size, "block_size", size) for size in spec.block_shape]
    block = math.prod(size for size in sizes if isinstance(size, int)) * operand.dtype.itemsize
    moves, before = 0, None
    for step in np.ndindex(*grid):
        index = tuple(int(i) for i in spec.index_map(*(np.int32(i) for i in step), *prefetch))
        moves += index != before
        before = index
    return float(block * moves)


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Collects every `pl.pallas_call` that is traced inside, without changing what it does."""
    calls, original = [], pl.pallas_call

    def recorder(body, out_shape, *, grid_spec=None, grid=(), in_specs=None, out_specs=None, **options):
        given = dict(grid=grid, in_specs=in_specs, out_specs=out_specs) if grid_spec is None else {}
        made = original(body, out_shape, **(given or {"grid_spec": grid_spec}), **options)
        spec = grid_spec or pl.GridSpec(grid=grid, in_specs=in_specs, out_specs=out_specs)
        leading = getattr(spec, "num_scalar_prefetch", 0)

        def call(*operands):
            specs = [*_flat(spec.in_specs), *_flat(spec.out_specs)]
            arrays = [*_flat(operands[leading:]), *_flat(out_shape)]
            blocked = list(zip(specs, arrays, strict=True))
            calls.append(Call(options["name"], tuple(spec.grid), blocked))
            return made(*operands)

        return call

    with unittest.mock.patch.object(pl, "pallas_call", recorder):
        yield calls


def _flat(tree: Any) -> list:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (pl.BlockSpec, jax.ShapeDtypeStruct)))


# --- one case for one chip, in a process of its own ----------------------------------------------------


def compile_program(program: Program, topology: str) -> tuple[str, list[Call]]:
    """The optimised HLO for one device of a described slice, and the calls that were traced."""
    jax.config.update("jax_enable_compilation_cache", False)  # its entries could not be read back
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    whole = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array([device]), ("x",)), jax.P())
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for name, x in program.shapes.items()
    }
    # A SparseCore kernel asks what chip it is for, which is otherwise the first device there is.
    with recorded_calls() as calls, jax.sharding.use_abstract_mesh(whole.mesh.abstract_mesh):
        lowered = jax.jit(program.function).lower(**arrays)
    return lowered.compile().as_text(), calls


def read_schedule(folder: Path, name: str, kernel: Kernel, grid: tuple[int, ...], chip: str) -> Schedule:
    """The schedule of one kernel from the dumps in `folder`; `name` is that of its HLO instruction."""

    def text(label: str) -> str:
        found = [
            p for p in folder.iterdir() if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{label}\.txt", p.name)
        ]
        if len(found) != 1:
            raise ValueError(f"{len(found)} dumps {label} of {name}: is it a kernel of the vector core?")
        return found[0].read_text()

    compiler, when = COMPILERS[chip], kernel.when and kernel.when(grid)
    return analyse(
        text("post-ra"),
        text("final_bundles"),
        text("final_hlo-static-per-bundle-utilization"),
        delay_slots=compiler.delay_slots,
        cycles_of_product=compiler.cycles_of_product,
        when=when,
        trips=kernel.trips,
    )


def estimate(case: Case, chip: str, folder: Path) -> dict[str, Any]:
    """The figures of one row."""
    program = case.build()
    hlo, calls = compile_program(program, COMPILERS[chip].topology)
    pallas, around = [], 0.0
    for line in hlo.splitlines():
        if '"tpu_custom_call"' in line:
            pallas += re.findall(r"%([\w.-]+) = ", line)[:1]
        elif cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
            around += int(cycles[1]) if int(cycles[1]) < NO_ESTIMATE else math.nan
    traced = {call.name: call for call in calls}
    owner = {name: max((x for x in traced if x in name), key=len, default="") for name in pallas}
    if missing := program.kernels.keys() - set(owner.values()):
        raise ValueError(f"no kernel {sorted(missing)} in the program, which has {pallas}")
    counted, hbm_bytes = {}, 0.0
    for name in pallas:
        if kernel := program.kernels.get(owner[name]):
            call = traced[owner[name]]
            counted[name] = read_schedule(folder, name, kernel, call.grid, chip)
            hbm_bytes += call.hbm_bytes(kernel.prefetch) + kernel.copied_bytes
    facts, cycles = CHIPS[chip], sum(s.cycles for s in counted.values())
    compute_us, hbm_us = 1e6 * cycles / facts.clock_hz, 1e6 * hbm_bytes / facts.hbm_bytes_per_second
    return {
        "bundles": sum(s.bundles for s in counted.values()),
        "cycles": cycles,
        "mxu": sum(s.mxu_share * s.cycles for s in counted.values()) / cycles,
        "valu": sum(s.valu_share * s.cycles for s in counted.values()) / cycles,
        "spill_stores": sum(s.spill_stores for s in counted.values()),
        "hbm_bytes": hbm_bytes,
        "vmem_bytes": max(s.vmem_bytes for s in counted.values()),
        "compute_us": compute_us,
        "hbm_us": hbm_us,
        "bound_us": max(compute_us, hbm_us),
        "roofline_us": 1e6 * facts.seconds(*case.cost()),
        "xla_around_us": None if math.isnan(around) else 1e6 * around / facts.clock_hz,
        "kernels": {name: dataclasses.asdict(s) for name, s in counted.items()},
    }


def _child(name: str, model: str, chip: str, folder: Path) -> None:
    try:
        case = next(case for case in cases(MODELS[model]()) if case.name == name)
        result = estimate(case, chip, folder)
    except Exception as error:  # a row that fails must not stop the others
        traceback.print_exc(file=sys.stderr)
        result = {"error": f"{type(error).__name__}: {error}"[:2000]}
    (folder / "row.json").write_text(json.dumps(result))


def measure(case: Case, model: str, chip: str, timeout_seconds: float) -> dict[str, Any]:
    """One row from a fresh process: the figures, or an `error`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = ENVIRONMENT | {"LIBTPU_INIT_ARGS": FLAGS.format(folder=folder)}
        with unittest.mock.patch.dict(os.environ, flags):
            child = multiprocessing.get_context("spawn").Process(
                target=_child, args=(case.name, model, chip, folder)
            )
            child.start()
        child.join(timeout_seconds)
        if child.is_alive():
            child.kill()
            child.join()
        result, row = folder / "row.json", {"model": model, "case": case.name, "chip": chip}
        if not result.exists():
            return row | {"error": f"no result within {timeout_seconds} s, exit code {child.exitcode}"}
        figures = {"target_us": case.target.get(chip), "peer_us": case.peer.get(chip)}
        return row | figures | json.loads(result.read_text())


# --- the table -----------------------------------------------------------------------------------------

COLUMNS = {
    "case": lambda r: r["case"],
    "chip": lambda r: r["chip"],
    "bundles": lambda r: f"{r['bundles']:,}",
    "cycles": lambda r: f"{r['cycles']:,.0f}",
    "MXU": lambda r: f"{r['mxu']:.0%}",
    "VALU": lambda r: f"{r['valu']:.0%}",
    "spill stores": lambda r: f"{r['spill_stores']:,.0f}",
    "HBM MB": lambda r: f"{r['hbm_bytes'] / 1e6:.1f}",
    "VMEM MiB": lambda r: f"{r['vmem_bytes'] / 2**20:.1f}",
    "compute us": lambda r: f"{r['compute_us']:.1f}",
    "HBM us": lambda r: f"{r['hbm_us']:.1f}",
    "bound us": lambda r: f"**{r['bound_us']:.1f}**",
    "roofline us": lambda r: f"{r['roofline_us']:.1f}",
    "target us": lambda r: "" if r["target_us"] is None else f"{r['target_us']:g}",
    "peer us": lambda r: "" if r["peer_us"] is None else f"{r['peer_us']:g}",
    "XLA around us": lambda r: "not known" if r["xla_around_us"] is None else f"{r['xla_around_us']:.1f}",
}

SHOWN = ("case", "chip", "compute us", "HBM us", "bound us", "target us", "peer us")
"""Columns on the terminal, where all would not fit."""


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text; one that failed says why behind its name."""
    if "error" in row:
        reason = " ".join(row["error"].split())[:120]
        return [row["case"], row["chip"], f"failed: {reason}"] + [""] * (len(COLUMNS) - 3)
    return [column(row) for column in COLUMNS.values()]


def markdown(record: dict[str, Any]) -> str:
    """All rows, a table a model."""
    text = ["# Static cycles of the Pallas kernels", "", CAVEATS, ""]
    for model in MODELS:
        rows = [row for row in record["rows"] if row["model"] == model]
        if rows:
            versions = sorted({f"{r['date']}, jax {r['jax']}, libtpu {r['libtpu']}" for r in rows})
            text += [f"## V4-{model.capitalize()} ({'; '.join(versions)})", ""]
            text += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
            text += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(row)) + " |" for row in rows]
            text.append("")
    return "\n".join(text)


def keep(out: Path, row: dict[str, Any], order: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Puts a row into the file, in place of an older one of the same case; `order` sorts known cases."""
    record = json.loads(out.read_text()) if out.exists() else {"rows": []}
    key = lambda r: (r["model"], r["case"], r["chip"])  # noqa: E731
    rows = [r for r in record["rows"] if key(r) != key(row)] + [row]
    rows.sort(key=lambda r: order.index(key(r)) if key(r) in order else len(order))
    record["rows"] = rows
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(record))
    return record


def main(options: Options) -> None:
    """Compiles every case for every chip and shows the table."""
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("libtpu is not installed: it holds the TPU compiler (Linux on x86-64, extra `test`)")
    console, every = Console(), cases(MODELS[options.model]())
    wanted = [case for case in every if any(part in case.name for part in options.only)]
    if not wanted:
        raise SystemExit(f"--only {options.only!r} is in none of: " + ", ".join(case.name for case in every))
    order = [(model, case.name, chip) for model in MODELS for case in every for chip in COMPILERS]
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("compiling", total=len(wanted) * len(options.chips))
        for chip in options.chips:
            for case in wanted:
                progress.update(task, description=f"{chip}: {case.name}")
                rows.append(measure(case, options.model, chip, options.timeout_seconds) | stamp)
                keep(options.out, rows[-1], order)
                progress.advance(task)
    table = Table(*SHOWN)
    for row in rows:
        by_column = dict(zip(COLUMNS, cells(row), strict=True))
        table.add_row(*(by_column[column].strip("*") for column in SHOWN))
    console.print(table)
    console.print(CAVEATS, soft_wrap=True)
    console.print(f"written: {options.out} and {options.out.with_suffix('.md')}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
