"""The numbers of a run on disk: one JSON object a line, and event files for TensorBoard."""

import collections
import contextlib
import json
import math
import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from dsv4_jax.errors import ProblemsError

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
GOODPUT_FILE = "goodput.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
RETRY_SECONDS = 10.0
"""Between a moment at which an event file could not be written and the next attempt."""


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

    A disk that takes no more is no reason to end a run: what could not be written is counted. A line of which
    a disk or a dying process left a part is ended before the next one, which is thus not lost with it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.num_lost = 0
        self._file: IO[bytes] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """One line."""
        line = (json.dumps(plain(record), ensure_ascii=False) + "\n").encode()
        try:
            if self._file is None:
                self._file = _opened(self.path)
            if self._file.write(line) == len(line):
                return
        except OSError:
            pass
        self.num_lost += 1
        self.close()

    def keep_steps(self, last: int) -> int:
        """Drops the records of steps after `last`, which come again; returns how many steps these were.

        Raises:
            ProblemsError: the file cannot be read or replaced; it is then as it was.
        """
        self.close()
        try:
            records = read_lines(self.path)
            kept = [record for record in records if record.get("step", 0) <= last]
            if self.path.exists():
                write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        except OSError as failure:
            problem = f"{self.path}: cannot be rewritten ({failure.strerror})"
            raise ProblemsError("cannot go on with this run", [problem]) from failure
        return len({record["step"] for record in records if record.get("step", 0) > last})

    def close(self) -> None:
        """Closes the file until the next line."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def _opened(path: pathlib.Path) -> IO[bytes]:
    """A file to append to, whose last line is whole."""
    file = open(path, "ab+", buffering=0)
    try:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
    except OSError:
        file.close()
        raise
    return file


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there as a whole or, after an OSError, as it was."""
    incoming = path.with_name(f".{path.name}.incoming")
    try:
        incoming.write_text(text, "utf8")
        os.replace(incoming, path)
    except OSError:
        with contextlib.suppress(OSError):
            incoming.unlink()
        raise


class TensorBoard:
    """Scalars and texts as event files; imports tensorboardX when the first one comes.

    It writes where it is called. The writer of tensorboardX has a thread of its own for that, which a full
    disk ends; whoever writes then waits for it for ever. Here records that could not be written are counted.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder
        self.num_lost = 0
        self._file: IO[bytes] | None = None
        self._num_files = 0
        self._again = 0.0  # when it is tried again after a failure

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of a record, at its step."""
        from tensorboardX.summary import scalar  # slow to import, and wanted by few runs

        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        self._add([{"summary": scalar(k, v), "step": record["step"]} for k, v in numbers.items()])

    def write_text(self, name: str, text: str, step: int) -> None:
        """A text, such as a sample."""
        from tensorboardX.summary import text as as_summary

        self._add([{"summary": as_summary(name, text), "step": step}])

    def _add(self, events: list[dict[str, Any]]) -> None:
        """All of them by one write, or none: a file with a torn record ends there for whoever reads it."""
        if time.monotonic() < self._again:
            self.num_lost += 1
            return
        try:
            if self._file is None:
                self.path.mkdir(parents=True, exist_ok=True)
                self._num_files += 1
                place = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{self._num_files}"
                self._file = open(self.path / f"events.out.tfevents.{place}", "xb", buffering=0)  # noqa: SIM115
                events = [{"file_version": "brain.Event:2"}, *events]
            data = b"".join(map(_framed, events))
            if self._file.write(data) == len(data):
                return
        except OSError:
            pass
        self.num_lost += 1
        self.close()
        self._again = time.monotonic() + RETRY_SECONDS

    def close(self) -> None:
        """Closes the file; the next record goes into another one."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def _framed(event: dict[str, Any]) -> bytes:
    """A record of an event file: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **event).SerializeToString()
    size = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(each)) for each in (size, data)]
    return size + sums[0] + data + sums[1]


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

    @contextlib.contextmanager
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
