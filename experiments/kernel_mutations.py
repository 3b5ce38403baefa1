"""Would the kernel tests notice? Puts one deliberate fault at a time into a copy of the tree and runs them.

    python -m experiments.kernel_mutations                    # all families
    python -m experiments.kernel_mutations --families indexer --faults tie
    python -m experiments.kernel_mutations --missing          # those not yet caught

A fault of `kernel_faults.toml` replaces an expression or statements of one function, which must occur there
exactly once, however they are formatted (`kernel_faults.py`). The family's default tests then have to fail;
those that only compile are left out, because they cannot notice a wrong value. Each family first runs without
a fault, and must pass. Exit code 1 if a fault survives or a run says nothing (collection error, timeout).
Needs the `test` extra.
"""

import dataclasses
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.kernel_faults import ROOT, Fault, read_faults

COPIED = ("pallas_kernels", "tests/kernels", "tests/conftest.py", "pyproject.toml")
LEFT_OUT = "not compile and not lower"  # tests that only compile, by name

FAULTS = read_faults()
FAMILIES = tuple(dict.fromkeys(fault.family for fault in FAULTS))


@dataclasses.dataclass
class Options:
    """What to break."""

    families: tuple[str, ...] = FAMILIES
    faults: str = ""
    """A part of the name of the faults wanted."""
    missing: bool = False
    """Only faults that `out` does not show as caught, word for word."""
    out: Path = ROOT / "experiments/results/kernel_mutations.json"
    """Also names the Markdown table: the same path with `.md`."""
    timeout_seconds: float = 600


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a family's tests said."""

    verdict: str  # "passed", "failed", "timeout" or "error": neither passed nor failed
    test: str  # the first that failed
    message: str
    seconds: float


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source, goal = ROOT / name, target / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, goal)


def run_tests(root: Path, family: str, timeout_seconds: float) -> Outcome:
    """The default tests of a family in a copy of the tree, up to the first failure."""
    # The copy comes first on the path, and no byte code outlives the text it was made from.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # all of them take longer than a short test
    # A family that also computes without kernels keeps the tests of these in a file of their own.
    tests = root / "tests/kernels"
    by_kernel = tests / f"test_{family}_tpu.py"
    files = [by_kernel] if by_kernel.exists() else sorted(tests.glob(f"test_{family}*.py"))
    # `pyproject.toml` sets options of xdist.
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "xdist.plugin", "-k", LEFT_OUT]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return Outcome("timeout", "", "", timeout_seconds)
    seconds = time.perf_counter() - start
    if done.returncode == 0:
        return Outcome("passed", "", "", seconds)
    failed = re.search(r"^FAILED \S+?::(.+?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        return Outcome("error", "", (done.stdout + done.stderr)[-1000:], seconds)
    return Outcome("failed", failed[1], failed[2] or "", seconds)


def markdown(rows: list[dict]) -> str:
    """The outcome of every fault."""
    caught, dates = sum(row["caught"] for row in rows), sorted({row["date"] for row in rows})
    text = [
        "# Deliberate faults in the Pallas kernels",
        "",
        f"{' and '.join(dates)}: {caught} of {len(rows)} faults were caught by the default tests of their"
        " family, without those that only compile. Every family passes without a fault.",
        "`python -m experiments.kernel_mutations`; the first test that fails is named.",
        "",
        "| family | fault | caught by | says |",
        "|---|---|---|---|",
    ]
    for row in rows:
        by = f"`{row['test']}`" if row["caught"] else f"**not caught** ({row['verdict']})"
        says = row["message"].replace("|", "/")[:100]
        text.append(f"| {row['family']} | {row['name']} | {by} | {says} |")
    return "\n".join(text) + "\n"


def keep(out: Path, row: dict) -> None:
    """Puts a row into the file in place of an older one; rows of faults that are no more go."""
    key = lambda row: (row["family"], row["name"])  # noqa: E731
    order = [(fault.family, fault.name) for fault in FAULTS]
    before = json.loads(out.read_text()) if out.exists() else []
    rows = [r for r in before if key(r) in order and key(r) != key(row)] + [row]
    rows.sort(key=lambda r: order.index(key(r)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(rows))


def caught(out: Path) -> list[Fault]:
    """The faults that the file shows as caught, as they were then."""
    rows = json.loads(out.read_text()) if out.exists() else []
    names = [field.name for field in dataclasses.fields(Fault)]
    return [Fault(**{name: row[name] for name in names}) for row in rows if row["caught"]]


def check(options: Options, console: Console) -> list[dict]:
    """One row a fault; written after each."""
    wanted = [x for x in FAULTS if x.family in options.families and options.faults in x.name]
    if not wanted:
        raise SystemExit(f"no fault of {options.families} has {options.faults!r} in its name")
    if options.missing:
        done = caught(options.out)
        wanted = [x for x in wanted if x not in done]
    rows: list[dict] = []
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        root = Path(folder)
        copy_tree(root)
        task = progress.add_task("faults", total=len(wanted))
        for family in dict.fromkeys(fault.family for fault in wanted):
            progress.update(task, description=f"{family}: no fault")
            control = run_tests(root, family, options.timeout_seconds)
            if control.verdict != "passed":
                raise SystemExit(f"{family} fails without a fault: {control}")
            for fault in (x for x in wanted if x.family == family):
                progress.update(task, description=f"{family}: {fault.name}")
                undo = fault.apply(root)
                outcome = run_tests(root, family, options.timeout_seconds)
                undo()
                row = dataclasses.asdict(fault) | dataclasses.asdict(outcome)
                rows.append(row | {"caught": outcome.verdict == "failed", "date": today})
                keep(options.out, rows[-1])
                progress.advance(task)
    return rows


def main(options: Options) -> None:
    """Checks all faults and shows the table."""
    console, table = Console(), Table("family", "fault", "caught by", "seconds")
    rows = check(options, console)
    for row in rows:
        by = row["test"] if row["caught"] else f"NOT CAUGHT: {row['verdict']} {row['message']}"
        table.add_row(row["family"], row["name"], by, f"{row['seconds']:.0f}")
    console.print(table)
    console.print(f"written: {options.out} and {options.out.with_suffix('.md')}")
    if not all(row["caught"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
