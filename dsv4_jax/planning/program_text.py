"""Reads a compiled TPU program: what XLA's own operations cost by the compiler's estimate, loops counted.

The compiler writes `estimated_cycles` at the operations it made itself. Pallas kernels, collectives and
asynchronous copies have none. A loop's body counts as often as the loop has trips: its condition compares a
count from 0 with a constant, as scans do. Of the branches of a conditional the dearest counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np


class ProgramError(ValueError):
    """A program text that does not look as expected."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation that has a cost or leads to other computations.

    Attributes:
        name: of its result.
        shape: of the result, as the text spells it.
        opcode: what it is.
        cycles: the compiler's estimate, 0 where it gives none.
        calls: the computations that run when it runs.
        condition: of a loop, the computation that ends it; empty for the others.
        scope: the path of names under which the source made it.
        groups: of a collective, the devices that take part together, as the text spells them.
    """

    name: str
    shape: str
    opcode: str
    cycles: int
    calls: tuple[str, ...]
    condition: str
    scope: str
    groups: str = ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """An instruction and what it costs in a whole run."""

    instruction: Instruction
    runs: int

    @property
    def cycles(self) -> int:
        """Of all runs together."""
        return self.runs * self.instruction.cycles


@dataclasses.dataclass
class Computation:
    """A list of instructions. `limit`: what the count of a loop must stay below, in the loop's condition."""

    instructions: list[Instruction]
    limit: int | None = None


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """The name of the entry computation, and all computations.

    Raises:
        ProgramError: without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current, constant = "", Computation([]), None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line):
            current, constant = Computation([]), None
            computations[head[2]] = current
            entry = head[2] if head[1] else entry
        elif made := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$", line):
            name, shape, opcode, rest = made.groups()
            current.instructions.append(_instruction(name, shape, opcode, rest))
            if opcode == "constant" and (number := re.match(r"(\d+)\)", rest)):
                constant = int(number[1])
            elif opcode == "compare" and "direction=LT" in rest:
                current.limit = constant
    if not entry:
        raise ProgramError("the text has no ENTRY computation")
    return entry, computations


def _instruction(name: str, shape: str, opcode: str, rest: str) -> Instruction:
    calls: tuple[str, ...] = ()
    condition = ""
    if opcode == "while":
        calls = (re.search(r"body=%?([\w.-]+)", rest)[1],)
        condition = re.search(r"condition=%?([\w.-]+)", rest)[1]
    elif opcode == "conditional":
        if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
            calls = tuple(branch.strip().lstrip("%") for branch in branches[1].split(","))
        else:
            calls = tuple(re.findall(r"(?:true|false)_computation=%?([\w.-]+)", rest))
    elif opcode == "call":
        calls = (re.search(r"to_apply=%?([\w.-]+)", rest)[1],)
    estimate = re.search(r'"estimated_cycles":"?(\d+)', rest)
    scope = re.search(r'op_name="([^"]*)"', rest)
    groups = re.search(r"(?:replica_groups|source_target_pairs)=(\{.*?\}\}|\{\}|\[\S*?(?=, |$))", rest)
    cycles = int(estimate[1]) if estimate and not calls else 0
    of_scope, of_groups = (found[1] if found else "" for found in (scope, groups))
    return Instruction(name, shape, opcode, cycles, calls, condition, of_scope, of_groups)


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
)
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "s32": 32, "u32": 32, "f8e4m3fn": 8, "u8": 8, "s8": 8}


def result_bytes(shape: str) -> int:
    """Bytes of the largest array of a result, as the text spells its shape."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * BITS.get(dtype, 64) // 8
        for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    ]
    return max(sizes, default=0)


def device_groups(spelled: str, num_devices: int) -> np.ndarray:
    """The devices that take part together, i64[groups, members], of an instruction's `groups`.

    Args:
        spelled: lists of numbers in braces, "[4,2]<=[8]" and "[4,2]<=[2,4]T(1,0)", or "" or "{}": all.
        num_devices: of the program.

    Raises:
        ProgramError: for another spelling.
    """
    if spelled in ("", "{}"):
        return np.arange(num_devices)[None]
    if spelled.startswith("{"):
        lists = re.findall(r"\{([\d,]+)\}", spelled)
        return np.array([[int(each) for each in one.split(",")] for one in lists])
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", spelled)
    if not found:
        raise ProgramError(f"{spelled!r} spells no groups of devices")
    shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers if order is None else numbers.transpose(order)).reshape(shape)


def axes_of(cost: Cost, mesh: Mapping[str, int]) -> str:
    """The axes of a mesh along which a collective moves, as "expert+tensor"; "none" for groups of one device.

    Args:
        cost: a collective, of a program whose devices are counted in the mesh's order.
        mesh: axis -> size, all axes in order.
    """
    groups = device_groups(cost.instruction.groups, math.prod(mesh.values()))
    places = np.unravel_index(groups, tuple(mesh.values()))
    return "+".join(axis for axis, at in zip(mesh, places, strict=True) if np.ptp(at, axis=1).any()) or "none"


def costs(text: str) -> list[Cost]:
    """Every instruction with an estimate that runs, dearest first.

    Raises:
        ProgramError: for a loop whose number of trips its condition does not tell.
    """
    return sorted(_walk(text, lambda one: one.cycles > 0), key=lambda cost: -cost.cycles)


def collectives(text: str) -> list[Cost]:
    """Every collective that runs, those first whose results of all runs are the largest; of an asynchronous
    one its start.

    Raises:
        ProgramError: as `costs`.
    """
    found = _walk(text, lambda one: one.opcode.removesuffix("-start") in COLLECTIVES)
    return sorted(found, key=lambda cost: -cost.runs * result_bytes(cost.instruction.shape))


def _walk(text: str, wanted: Callable[[Instruction], bool]) -> list[Cost]:
    entry, computations = parse(text)

    def trips(one: Instruction) -> int:
        if not one.condition:
            return 1
        limit = computations[one.condition].limit
        if limit is None:
            raise ProgramError(f"the loop {one.name} has no known number of trips")
        return limit

    @functools.cache
    def total(name: str) -> int:
        return sum(
            one.cycles + trips(one) * sum(map(total, chosen(one))) for one in computations[name].instructions
        )

    def chosen(one: Instruction) -> tuple[str, ...]:
        return (max(one.calls, key=total),) if one.opcode == "conditional" else one.calls

    def walk(name: str, runs: int) -> Iterator[Cost]:
        for one in computations[name].instructions:
            if wanted(one):
                yield Cost(one, runs)
            for below in chosen(one):
                yield from walk(below, runs * trips(one))

    return list(walk(entry, 1))
