"""`dsv4 bench`: a short load on a checkpoint, and what its clients saw."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv4_jax.errors import ProblemsError
from dsv4_jax.loading import load
from dsv4_jax.model.cache_blocks import block_length
from dsv4_jax.serving.engine import Engine
from dsv4_jax.serving.load import Load, run, summary
from dsv4_jax.serving.settings import EngineSettings

UNITS = {"seconds": "s", "second": "tokens/s", "share": "", "p50": "ms", "p90": "ms", "p99": "ms"}


def bench(
    folder: Path,
    sent: Load,
    settings: EngineSettings,
    dtype: str = "bfloat16",
    mesh: str | None = None,
    allow_links: Path | None = None,
    out: Path | None = None,
) -> dict[str, float]:
    """Loads a checkpoint, serves a load, prints the numbers, and writes them to `out` as JSON.

    Raises:
        ProblemsError: for a load or sizes that cannot work, before anything is loaded where that is known.
    """
    if problems := sent.problems(settings.max_length):
        raise ProblemsError("this load cannot be sent", problems)
    console = Console(stderr=True, highlight=False)
    with console.status(f"loading {folder}"):
        lm = load(folder, dtype=dtype, mesh=mesh, allow_links=allow_links)
    if problems := settings.problems(block_length(lm.config), lm.config):
        raise ProblemsError("the engine cannot start", problems)
    with console.status("compiling"):
        engine = Engine(lm, settings)
    console.print(f"compiled in {engine.warm_up_seconds:.1f} s; sending {sent.num_requests} requests")
    with engine:
        found = summary(*run(engine, sent))
    table = Table("what", "number", "unit")
    for name, value in found.items():
        unit = UNITS.get(name.rsplit("_", 1)[-1], "")
        table.add_row(name.replace("_", " "), f"{value:,.4g}", unit)
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    return found
