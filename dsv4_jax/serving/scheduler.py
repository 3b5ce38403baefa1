"""Who is served next: lanes for prompts, slots for answers. Host logic alone, without arrays.

A sequence waits, is computed in a lane chunk by chunk, moves to the slot that was kept for it, and leaves. A
more important one may take the slot of a less important one, which waits again with its row kept.
"""

import collections
import dataclasses
import heapq
import itertools
import time
from typing import Any, Literal

from dsv4_jax.serving.constraints import Guide
from dsv4_jax.serving.prefix_cache import Key
from dsv4_jax.serving.requests import Sampling

Stage = Literal["waiting", "prefilling", "running", "finished"]


@dataclasses.dataclass(eq=False)
class Sequence:
    """One answer in the making; the engine's own record of it."""

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int]
    salt: bytes = b""
    priority: int = 0  # the smaller, the sooner
    stage: Stage = "waiting"
    output: list[int] = dataclasses.field(default_factory=list)
    lane: int | None = None
    slot: int | None = None
    done: int = 0  # prompt tokens in the lane's row
    cached: int = 0  # of them, taken from the prefix cache
    keys: list[Key] = dataclasses.field(default_factory=list)  # of the prompt's whole blocks
    states_at: frozenset[int] = frozenset()  # blocks after which the state is kept
    kept: Any = None  # its row and next logits, while it waits again
    text: Any = None  # from ids to text
    came: float = dataclasses.field(default_factory=time.monotonic)
    admitted: float | None = None  # when its prompt came into a lane
    guide: Guide | None = None  # through the grammar of the answer

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sequences by importance; of equal ones the older comes first."""
        return self.priority, self.id


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Prompt tokens that a lane appends in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete after it."""
        return self.start + self.count == len(self.sequence.prompt)


class Scheduler:
    """Waiting sequences, lanes and slots.

    Args:
        num_slots: answers at once. num_lanes: prompts at once.
        chunk: prompt tokens of a lane in a step; chunks begin at its multiples, so that the same prompt is
            always cut the same way.
    """

    def __init__(self, num_slots: int, num_lanes: int, chunk: int) -> None:
        self.chunk = chunk
        self.slots: list[Sequence | None] = [None] * num_slots
        self.lanes: list[Sequence | None] = [None] * num_lanes
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._numbers = itertools.count()
        self.num_preemptions = 0

    def next_id(self) -> int:
        """A number that no sequence had before."""
        return next(self._numbers)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot or lane."""
        return sum(sequence.stage == "waiting" for _, sequence in self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in slots and lanes."""
        return sum(sequence is not None for sequence in self.slots)

    @property
    def tokens_held(self) -> int:
        """Tokens of those in slots that are computed. Any thread may ask."""
        return sum(
            each.done if each.stage == "prefilling" else len(each.prompt) + len(each.output)
            for each in list(self.slots)
            if each is not None
        )

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.num_running or self.num_waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        sequence.stage = "waiting"
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def admit(self) -> list[Sequence]:
        """Gives free slots, and lanes to those whose prompt is not computed, to the most important ones."""
        admitted = []
        while (sequence := self._first()) is not None and None in self.slots:
            if sequence.kept is None and None not in self.lanes:
                break
            heapq.heappop(self._waiting)
            sequence.slot = self.slots.index(None)
            self.slots[sequence.slot] = sequence
            if sequence.kept is None:
                sequence.lane = self.lanes.index(None)
                self.lanes[sequence.lane] = sequence
                sequence.stage = "prefilling"
            else:
                sequence.stage = "running"
            admitted.append(sequence)
        return admitted

    def victim(self) -> Sequence | None:
        """The running sequence that should make room for a more important one that waits, if any."""
        first = self._first()
        if first is None or None in self.slots:
            return None
        running = [each for each in self.slots if each is not None and each.stage == "running"]
        last = max(running, key=lambda each: each.order, default=None)
        return last if last is not None and last.priority > first.priority else None

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's slot; its row was kept by the caller."""
        self._leave(sequence)
        self.num_preemptions += 1
        self.add(sequence)

    def chunks(self) -> list[Chunk]:
        """The next piece of every prompt in a lane."""
        found = []
        for sequence in self.lanes:
            if sequence is not None:
                most = self.chunk - sequence.done % self.chunk
                found.append(Chunk(sequence, sequence.done, min(most, len(sequence.prompt) - sequence.done)))
        return found

    def complete(self, sequence: Sequence) -> None:
        """Its prompt is computed: the lane is free."""
        self.lanes[sequence.lane] = None
        sequence.lane, sequence.stage = None, "running"

    def finish(self, sequence: Sequence) -> None:
        """It needs nothing any more, wherever it was."""
        self._leave(sequence)
        sequence.stage, sequence.kept = "finished", None

    def _leave(self, sequence: Sequence) -> None:
        if sequence.lane is not None:
            self.lanes[sequence.lane] = None
        if sequence.slot is not None:
            self.slots[sequence.slot] = None
        sequence.lane = sequence.slot = None

    def _first(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].stage != "waiting":
            heapq.heappop(self._waiting)  # aborted while it waited
        return self._waiting[0][1] if self._waiting else None

    def counts(self) -> collections.Counter[str]:
        """How many slots are in which stage."""
        return collections.Counter(each.stage for each in self.slots if each is not None)
