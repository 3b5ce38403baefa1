"""Reads what the TPU compiler writes about one kernel: its final schedule, its loops and its conditionals.

Two texts are enough. `post-ra` is the program as a tree of regions, with the trip counts of loops and the
branches; `final_bundles` is the schedule, one bundle of instructions a cycle, marked where regions start and
end. A third, `final_hlo-static-per-bundle-utilization`, counts the slots that each bundle fills.

    cycles = sum over bundles of how often the bundle runs

A loop runs its bundles as often as it has trips. Pallas turns a grid into a loop of two more trips than there
are steps (fetch the first block, write the last one), with the body of the kernel behind a conditional that
runs once a step. A conditional of the kernel itself (`pl.when`) runs as often as the caller says.
"""

import dataclasses
import re
from collections.abc import Sequence

SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
"""Columns of the table of slots, in its order."""

SMALL = 32
"""Bundles below which a conditional may become predicated instructions, on one chip and not on another."""

GUARD = 8
"""Bundles by which the ends of a loop and of a jump over it may differ: instructions move across them."""

ALLOCATION = re.compile(r"#allocation.*space=vmem, size = (0x[0-9a-f]+)")


class DumpError(ValueError):
    """A dump that does not look as expected, or numbers that do not fit it."""


@dataclasses.dataclass(frozen=True)
class Jump:
    """A branch of the region tree: back to the body of a loop, or forward over a conditional."""

    target: int  # region
    is_loop: bool
    trips: int | None = None  # of a loop; None where the bound is known only at run time


def parse_regions(text: str) -> list[Jump]:
    """The jumps of a `post-ra` dump, in the order of the program."""
    trips: dict[int, int | None] = {}  # of a loop's body
    announced: dict[int, int | None] = {}  # trips by indentation, until the body comes
    jumps = []
    for line in text.splitlines():
        indentation = len(line) - len(line.lstrip())
        if bounds := re.match(r" *loop: start=(\S+), step=(\S+), limit=(\S+)", line):
            numbers = [int(x) if re.fullmatch(r"-?\d+", x) else None for x in bounds.groups()]
            announced[indentation] = None if None in numbers else _trips(*numbers)
        elif body := re.match(r" *\$region(\d+):.*// loop_body", line):
            trips[int(body[1])] = announced.pop(indentation, None)
        elif jump := re.search(r"= sbr\.rel .*target = \$region(\d+)", line):
            target = int(jump[1])
            jumps.append(Jump(target, target in trips, trips.get(target)))
    return jumps


def _trips(start: int, step: int, limit: int) -> int:
    return max(0, -(-(limit - start) // step))


@dataclasses.dataclass(frozen=True)
class Bundles:
    """The final schedule: the text of each bundle, where regions start, and where jumps to them are."""

    texts: list[str]
    start: dict[int, int]
    jump: dict[int, int]  # by the region that the jump leads to


def parse_bundles(text: str) -> Bundles:
    """A `final_bundles` dump. Comments of copies run over several lines and belong to the line before."""
    texts: list[str] = []
    for line in text.splitlines():
        if head := re.match(r" *(0x[0-9a-f]+|0) *(?:[A-Z]{2})? *:[ >]*\{", line):
            if int(head[1], 16) != len(texts):
                raise DumpError(f"bundle {head[1]} follows {len(texts)} bundles")
            texts.append(line)
        elif texts:
            texts[-1] += " " + line
    start: dict[int, int] = {}
    jump: dict[int, int] = {}
    for index, bundle in enumerate(texts):
        start |= {int(x): index for x in re.findall(r"Start(?:/End empty)? region (\d+)", bundle)}
        for target in re.findall(r"= sbr\.rel .*?target = \$region(\d+)", bundle):
            if int(target) in jump:
                raise DumpError(f"two jumps to region {target}")
            jump[int(target)] = index
    return Bundles(texts, start, jump)


def parse_slots(text: str, num_bundles: int) -> tuple[list[int], list[list[int]]]:
    """Capacity of each of `SLOTS`, and how many of them each bundle fills."""
    rows = [[int(x) for x in line.split()] for line in text.splitlines() if re.fullmatch(r"[\d ]*\d *", line)]
    if len(rows) != num_bundles + 1 or any(len(row) != len(SLOTS) for row in rows):
        raise DumpError(f"{len(rows)} rows of slots for {num_bundles} bundles")
    return rows[0], rows[1:]


@dataclasses.dataclass
class Span:
    """Consecutive bundles that run `runs` times as often as what surrounds them."""

    first: int
    last: int
    kind: str  # "loop", "step" (the body of the grid), "guard" (of a loop), "copy" (of a block) or "when"
    runs: float | None  # None: not known from the dump

    @property
    def bundles(self) -> int:
        return self.last - self.first + 1

    def contains(self, other: "Span") -> bool:
        return self is not other and self.first <= other.first and other.last <= self.last

    def guards(self, other: "Span") -> bool:
        """Whether this one jumps over nothing but a loop that may have no trips."""
        is_loop = other.kind == "loop" and other.runs is None
        overlap = self.first <= other.last and other.first <= self.last
        return (
            is_loop and overlap and max(abs(self.first - other.first), abs(self.last - other.last)) <= GUARD
        )


def find_spans(jumps: list[Jump], bundles: Bundles, delay_slots: int) -> list[Span]:
    """Loops and conditionals as spans of bundles, outer ones first, else in the order of the program."""
    first_jump = min(bundles.jump, key=bundles.jump.get, default=None)
    unmarked = bundles.jump.keys() - bundles.start.keys()
    # v5p: the second core of a device jumps to the end of a kernel whose grid is not split, at its beginning.
    idle_core = first_jump if unmarked == {first_jump} else None
    if {jump.target for jump in jumps} != bundles.jump.keys() or unmarked - {idle_core}:
        raise DumpError(
            f"jumps to {[jump.target for jump in jumps]} in the tree, to {list(bundles.jump)} in the schedule"
        )
    spans = []
    for jump in jumps:
        if jump.target == idle_core:
            continue
        target, last = bundles.start[jump.target], bundles.jump[jump.target] + delay_slots
        if jump.is_loop != (target <= bundles.jump[jump.target]):
            raise DumpError(f"the jump to region {jump.target} leads the wrong way")
        span = (
            Span(target, last, "loop", jump.trips)
            if jump.is_loop
            else Span(last + 1, target - 1, "when", None)
        )
        if span.bundles > 0:
            spans.append(span)
    # The mark stands in the loop's first bundle, or further down where the index was spilled.
    marked = [s for s in spans if s.kind == "loop" and _has_mark(bundles.texts[s.first : s.last + 1])]
    grid = [loop for loop in marked if not any(loop.contains(other) for other in marked)]
    conditionals = [s for s in spans if s.kind == "when"]
    for span in conditionals:
        steps = next((loop.runs for loop in grid if loop.contains(span)), None)
        if steps and not any(other.contains(span) for other in conditionals):
            span.kind, span.runs = "step", (steps - 2) / steps
        elif any(span.guards(loop) for loop in spans):
            span.kind, span.runs = "guard", 1.0
        elif _is_block_copy(bundles.texts[span.first : span.last + 1]):
            span.kind, span.runs = "copy", 1.0
    return sorted(spans, key=lambda s: (s.first, -s.last))


def _has_mark(texts: list[str]) -> bool:
    """Whether a loop counts the steps of a grid."""
    return any("iteration index, stage" in x for x in texts)


def _is_block_copy(texts: list[str]) -> bool:
    """Whether a conditional only starts or awaits the copy of a block: Pallas made it, not the kernel."""
    return any("window_bounds:" in x for x in texts) and not any("= vst" in x for x in texts)


def fill_in(
    spans: list[Span], when: float | Sequence[float] | None, trips: float | Sequence[float] | None
) -> tuple[list[Span], list[str]]:
    """Sets the `runs` that the dump does not tell, as `analyse` describes them.

    Returns:
        The conditionals of the kernel that were given a number, and what was assumed of others.
    """
    unknown = {kind: [s for s in spans if s.kind == kind and s.runs is None] for kind in ("when", "loop")}
    if isinstance(when, Sequence):
        for span in unknown["when"]:
            if span.bundles < SMALL:
                span.runs = 1.0
        unknown["when"] = [s for s in unknown["when"] if s.runs is None]
    assumed = []
    for kind, given in (("when", when), ("loop", trips)):
        sizes = [span.bundles for span in unknown[kind]]
        if isinstance(given, (int, float)):
            given = [given] * len(sizes)
        if given is None:
            assumed += [f"{kind} of {size} bundles counted once" for size in sizes]
            given = [1.0] * len(sizes)
        if len(given) != len(sizes):
            raise DumpError(f"{len(given)} numbers given for {len(sizes)} `{kind}`s of {sizes} bundles")
        for span, runs in zip(unknown[kind], given, strict=True):
            span.runs = runs
    return unknown["when"], assumed


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one kernel costs according to its schedule; everything but `bundles` counts loops."""

    bundles: int
    cycles: float
    mxu_share: float  # of the cycles in which the matrix units are busy
    valu_share: float  # of the vector ALU slots
    spill_stores: float
    vmem_bytes: int
    weighted: list[tuple[int, float]]  # (bundles, runs) of the conditionals of the kernel
    assumed: list[str]  # what was counted without knowing how often it runs


def analyse(
    post_ra: str,
    final_bundles: str,
    slots: str,
    *,
    delay_slots: int,
    cycles_of_product: dict[str, float],
    when: float | Sequence[float] | None = None,
    trips: float | Sequence[float] | None = None,
) -> Schedule:
    """Loop-weighted cost of one kernel.

    Args:
        post_ra, final_bundles, slots: the three dumps of the kernel.
        delay_slots: bundles that still run after a jump.
        cycles_of_product: cycles of a matrix unit for one `vmatmul` over the number of units, by operand
            dtype; "" for any other. A loop or conditional takes at least its products' cycles: on some
            chips the compiler schedules them more tightly than the array takes them.
        when: how often each conditional of the kernel runs each time its surroundings run, in the order of
            the program, or one number for all. A list is for those of at least `SMALL` bundles; smaller
            ones count in full. None counts each in full and says so.
        trips: of each loop whose bound is known only at run time, or one number for all. None counts each
            once and says so.

    Raises:
        DumpError: for an unexpected dump, or `when` or `trips` of the wrong length.
    """
    bundles = parse_bundles(final_bundles)
    count = len(bundles.texts)
    spans = find_spans(parse_regions(post_ra), bundles, delay_slots)
    weighted, assumed = fill_in(spans, when, trips)
    runs, innermost = [1.0] * count, [-1] * count
    for number, span in enumerate(spans):  # outer ones first: the last to claim a bundle is the innermost
        for index in range(span.first, span.last + 1):
            runs[index] *= span.runs
            innermost[index] = number
    capacity, filled = parse_slots(slots, count)
    products = [_product_cycles(text, cycles_of_product) for text in bundles.texts]
    issued: dict[int, float] = {}
    busy: dict[int, float] = {}
    for index in range(count):
        span = innermost[index]
        issued[span] = issued.get(span, 0.0) + runs[index]
        busy[span] = busy.get(span, 0.0) + runs[index] * products[index]
    cycles = sum(max(issued[span], busy[span]) for span in issued)

    def total(slot: str) -> float:
        column = SLOTS.index(slot)
        return sum(times * row[column] for times, row in zip(runs, filled, strict=True))

    return Schedule(
        bundles=count,
        cycles=cycles,
        mxu_share=sum(busy.values()) / cycles,
        valu_share=total("VALU") / (capacity[SLOTS.index("VALU")] * cycles),
        spill_stores=total("SPILL"),
        vmem_bytes=sum(int(size, 16) for size in ALLOCATION.findall(post_ra)),
        weighted=[(span.bundles, span.runs) for span in weighted],
        assumed=assumed,
    )


def _product_cycles(bundle: str, cycles_of_product: dict[str, float]) -> float:
    total = 0.0
    for operation in re.findall(r"= vmatmul\.([\w.]*)", bundle):
        dtype = next((name for name in cycles_of_product if name and name in operation), "")
        total += cycles_of_product[dtype]
    return total
