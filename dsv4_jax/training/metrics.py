"""The numbers of a run on disk: one JSON object a line, and event files for TensorBoard."""

import collections
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
GOODPUT_FILE = "goodput.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can say of a record; it has no word for numbers that are none: they become null."""

    def value(given: Any) -> Any:
        if isinstance(given, float):
            return given if math.isfinite(given) else None
        if isinstance(given, (list, tuple)):
            return [value(each) for each in given]
        return given

    return {key: value(given) for key, given in record.items()}


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a file of records; a last one that was cut short is left out, and so is the file
    that is not there."""
    try:
        text = path.read_text("utf8", "replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


class RecordFile:
    """Appends records to a file, a line each, which is handed to the system at once.

    A disk that takes no more is no reason to end a run: what could not be written is counted.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.num_lost = 0
        self._file: IO[str] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """One line."""
        line = json.dumps(plain(record), ensure_ascii=False) + "\n"
        try:
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf8")  # noqa: SIM115 - closed below
            self._file.write(line)
            self._file.flush()
        except OSError:
            self.num_lost += 1

    def keep_steps(self, last: int) -> int:
        """Drops the records of steps after `last`, which come again; returns how many steps these were."""
        self.close()
        records = read_lines(self.path)
        kept = [record for record in records if record.get("step", 0) <= last]
        if self.path.exists():
            incoming = self.path.with_name(f".{self.path.name}.incoming")
            incoming.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf8")
            os.replace(incoming, self.path)
        return len({record["step"] for record in records if record.get("step", 0) > last})

    def close(self) -> None:
        """Closes the file until the next line."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard:
    """Scalars and texts as event files; imports tensorboardX when the first one comes."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of a record, at its step."""
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._open().add_scalar(key, value, record["step"])

    def write_text(self, name: str, text: str, step: int) -> None:
        """A text, such as a sample."""
        self._open().add_text(name, text, step)

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter  # slow to import, and wanted by few runs

            self._writer = SummaryWriter(str(self._folder), flush_secs=10)
        return self._writer

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Goodput:
    """Where the time of a session goes: what is not said to go elsewhere goes into steps.

    Args:
        file: gets a line at each `write`, with the sums of the session so far; the last one counts.
        session: a name that no other session of the run has.
    """

    def __init__(self, file: RecordFile | None, session: str) -> None:
        self._file, self._session = file, session
        self._start = time.monotonic()
        self._elsewhere: dict[str, float] = collections.defaultdict(float)
        self.steps = 0
        self.repeated_steps = 0

    @contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """The seconds of the block go there."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._elsewhere[what] += time.monotonic() - start

    @property
    def besides(self) -> float:
        """Seconds of this session that went neither into steps nor into waiting for data."""
        return sum(spent for what, spent in self._elsewhere.items() if what != "data")

    def sums(self) -> dict[str, Any]:
        """Seconds by use, of this session."""
        wall = time.monotonic() - self._start
        seconds = {what: round(spent, 3) for what, spent in sorted(self._elsewhere.items())}
        seconds["steps"] = round(wall - sum(self._elsewhere.values()), 3)
        return {
            "session": self._session,
            "wall": round(wall, 3),
            "seconds": seconds,
            "steps": self.steps,
            "repeated_steps": self.repeated_steps,
        }

    def write(self) -> None:
        """One line."""
        if self._file is not None:
            self._file.write(self.sums())

    def close(self) -> None:
        """The last line."""
        self.write()
        if self._file is not None:
            self._file.close()


def goodput_share(path: pathlib.Path) -> float:
    """Share of the wall time of all sessions of a run that went into steps which were not done again later.

    Args:
        path: of its `GOODPUT_FILE`.
    """
    last = {record["session"]: record for record in read_lines(path)}
    wall = sum(record["wall"] for record in last.values())
    steps = sum(record["steps"] for record in last.values())
    seconds = sum(record["seconds"]["steps"] for record in last.values())
    repeated = sum(record["repeated_steps"] for record in last.values())
    lasting = seconds * (1.0 - min(1.0, repeated / steps)) if steps else 0.0
    return lasting / wall if wall else 0.0
