"""A job's step, compiled for its slice: what the compiler says it holds, computes and moves. Nothing runs."""

import collections
import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np

from dsv4_jax.errors import ProblemsError
from dsv4_jax.planning.described import on_a_device, version
from dsv4_jax.planning.job import Job
from dsv4_jax.planning.program_text import ProgramError, axes_of, collectives, costs, result_bytes
from dsv4_jax.planning.step_shapes import Lowered, lowered

LARGE = 32 * 2**20
"""Bytes from which an array that is whole on every device is named."""

KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        opcode: without -start.
        axes: of the mesh that it moves along, joined by +.
        num_bytes: of its largest result on a device.
        runs: in a step.
        shape: of the result, as the program spells it.
        scope: the path of names under which the source made it.
    """

    opcode: str
    axes: str
    num_bytes: int
    runs: int
    shape: str
    scope: str


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step, of one device.

    Attributes:
        libtpu: version of the compiler.
        lower_seconds, compile_seconds: that it took.
        arguments: bytes of the shapes, by kind: weights, optimizer, cache.
        argument_bytes: of all arguments in their layouts, padding included.
        output_bytes: of results.
        alias_bytes: of results that take the place of arguments.
        temporary_bytes: what the step makes and drops; in training gradients are among them.
        peak_bytes: most that are held at once.
        flops: of XLA's own operations by its count, a loop's body counted once; kernels have none. None where
            it gives no count.
        kernel_calls: in the text of the program.
        xla_seconds: XLA's own operations, one after the other, by its estimated cycles; None where a loop's
            length is not in the program.
        whole: arguments of at least LARGE bytes that every device holds whole: name -> bytes.
        moved: collectives, those with the most bytes in a step first.
    """

    libtpu: str
    lower_seconds: float
    compile_seconds: float
    arguments: dict[str, int]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    flops: float | None
    kernel_calls: int
    xla_seconds: float | None
    whole: dict[str, int]
    moved: tuple[Collective, ...]

    @property
    def held_bytes(self) -> int:
        """Arguments, results beside them, and temporaries: what a slice must have."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def moved_by_axes(self) -> dict[str, int]:
        """Bytes of the results of collectives in a step, by the axes of the mesh; the most first."""
        sums: collections.Counter[str] = collections.Counter()
        for each in self.moved:
            sums[each.axes] += each.runs * each.num_bytes
        return dict(sums.most_common())

    @property
    def moved_by_kind(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(collective, axes) -> bytes of results and runs in a step; the most bytes first."""
        sums: dict[tuple[str, str], tuple[int, int]] = {}
        for each in self.moved:
            num_bytes, runs = sums.get((each.opcode, each.axes), (0, 0))
            sums[each.opcode, each.axes] = (num_bytes + each.runs * each.num_bytes, runs + each.runs)
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: bytes and seconds; of collectives the sums and the eight largest."""
        plain = dataclasses.asdict(self) | {"held_bytes": self.held_bytes}
        largest = sorted(self.moved, key=lambda each: -each.num_bytes)[:8]
        plain["moved"] = [
            {"opcode": opcode, "axes": axes, "bytes": num_bytes, "runs": runs}
            for (opcode, axes), (num_bytes, runs) in self.moved_by_kind.items()
        ]
        plain["largest"] = [dataclasses.asdict(each) for each in largest]
        plain["moved_by_axes"] = self.moved_by_axes
        return plain


def compiled(job: Job, text: list[str] | None = None) -> Compiled:
    """Compiles the step of a job. Minutes for whole models.

    Args:
        job: whose step; its slice decides the compiler's target.
        text: gets the program's text appended, if given.

    Raises:
        ProblemsError: as `lowered`; where the compiler refuses, with what it said.
    """
    started = time.monotonic()
    step = lowered(job)
    lowering, started = time.monotonic() - started, time.monotonic()
    program = _program(step.program, job)
    compiling = time.monotonic() - started
    written = program.as_text()
    if text is not None:
        text.append(written)
    return report(program, written, step, job, (lowering, compiling))


def _program(step: jax.stages.Lowered, job: Job) -> jax.stages.Compiled:
    # A program for devices that are not here cannot be read back from the cache of compiled programs.
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return step.compile()
    except Exception as failure:  # what a compiler may say has no type of its own
        said = " ".join(str(failure).split())
        raise ProblemsError(f"the compiler refuses this step on {job.slice}", [said[:1500]]) from failure
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def report(program: jax.stages.Compiled, text: str, step: Lowered, job: Job, seconds: Any) -> Compiled:
    """What a compiled program says of itself.

    Args:
        program: compiled.
        text: of it.
        step: that it was made of.
        job: whose.
        seconds: (lowering, compiling).
    """
    memory, sizes = program.memory_analysis(), dict(step.placement.mesh.shape)
    kinds = {name: sum(map(on_a_device, jax.tree.leaves(tree))) for name, tree in step.kinds.items()}
    moved = tuple(
        Collective(
            cost.instruction.opcode.removesuffix("-start"),
            axes_of(cost, sizes),
            result_bytes(cost.instruction.shape),
            cost.runs,
            cost.instruction.shape[:160],
            cost.instruction.scope[-160:],
        )
        for cost in collectives(text)
    )
    try:
        cycles: float | None = sum(cost.cycles for cost in costs(text))
    except ProgramError:
        cycles = None
    analysis = program.cost_analysis() or {}
    flops = float(analysis["flops"]) if np.isfinite(analysis.get("flops", np.nan)) else None
    return Compiled(
        version(), *seconds, kinds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        flops=flops,
        kernel_calls=len(re.findall(re.escape(KERNEL), text)),
        xla_seconds=None if cycles is None else cycles / job.slice.chip.clock_hz,
        whole=whole_arrays(step.kinds),
        moved=moved,
    )  # fmt: skip


def whole_arrays(kinds: dict[str, Any]) -> dict[str, int]:
    """Arguments of LARGE bytes and more that every device holds whole, largest first: name -> bytes."""
    found = {
        f"{kind}{jax.tree_util.keystr(path)}": on_a_device(leaf)
        for kind, tree in kinds.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.sharding.is_fully_replicated and on_a_device(leaf) >= LARGE
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))
