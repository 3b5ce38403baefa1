"""Files of records: whole text files, lines of JSON, a column of Parquet; each record by its number.

Reading a record never raises for what is in it: it gives a `BadRecord` that says where it is.
"""

import bisect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv4_jax.reading.strict_json import JsonError, parse_json
from dsv4_jax.training.documents import BadRecord, DataError, Document
from dsv4_jax.training.tokenizer import TextEncoder

MAX_RECORD_BYTES = 2**28
MAX_RECORD_DEPTH = 64
MAX_RECORD_ITEMS = 10_000_000
_CHUNK = 2**24


class Records(Protocol):
    """Records by number; reading one changes nothing, so several threads may."""

    def __len__(self) -> int:
        """How many there are, bad ones included."""

    def read(self, number: int) -> Any:
        """The record, or a `BadRecord`."""

    def place(self, number: int) -> str:
        """Where it is, for messages."""


def half_a_pair(place: str, error: UnicodeEncodeError) -> BadRecord:
    """A text that JSON can spell and UTF-8 cannot."""
    return BadRecord(place, f"holds half of a surrogate pair, at character {error.start}")


class EncodedTexts:
    """Documents of records that are texts."""

    def __init__(self, records: Records, encoder: TextEncoder) -> None:
        self._records, self._encoder = records, encoder
        self.place = records.place

    def __len__(self) -> int:
        return len(self._records)

    def read(self, number: int, draw: np.random.Generator) -> Document | BadRecord:
        text = self._records.read(number)
        if isinstance(text, BadRecord):
            return text
        if not text:
            return BadRecord(self.place(number), "is empty")
        try:
            return Document(self._encoder.document(text, draw))
        except UnicodeEncodeError as error:
            return half_a_pair(self.place(number), error)


class TextsInMemory:
    """Texts that are already there, with a name each."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def place(self, number: int) -> str:
        return self._texts[number][0]

    def read(self, number: int) -> str:
        return self._texts[number][1]


class TextFileRecords:
    """Files of UTF-8 text, each one record."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def place(self, number: int) -> str:
        return str(self._paths[number])

    def read(self, number: int) -> str | BadRecord:
        path = self._paths[number]
        try:
            size = path.stat().st_size
            if size > MAX_RECORD_BYTES:
                return BadRecord(str(path), f"has {size:,} bytes; at most {MAX_RECORD_BYTES:,} are one text")
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            return BadRecord(str(path), f"is not UTF-8 (byte {error.start}: {error.reason})")
        except OSError as error:
            return BadRecord(str(path), f"cannot be read ({error.strerror})")


class JsonLineRecords:
    """Files with a JSON object on each line.

    The files are read through once, to find where lines start (8 bytes of memory a line). A last line without
    its end is a line all the same.

    Raises:
        DataError: files that cannot be read, all of them at once.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._lines, problems = [], []
        for path in paths:
            try:
                self._lines.append(_line_starts(path))
            except OSError as error:
                problems.append(f"{path}: cannot be read ({error.strerror})")
        if problems:
            raise DataError("cannot read the training data", problems)
        self._first = list(itertools.accumulate((len(lines) - 1 for lines in self._lines), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def _found(self, number: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._first, number) - 1
        return file, number - self._first[file]

    def place(self, number: int) -> str:
        file, line = self._found(number)
        return f"{self._paths[file]}, line {line + 1}"

    def read(self, number: int) -> dict | BadRecord:
        file, line = self._found(number)
        start, end = self._lines[file][line : line + 2].tolist()
        place = self.place(number)
        if end - start > MAX_RECORD_BYTES:
            return BadRecord(place, f"has {end - start:,} bytes; at most {MAX_RECORD_BYTES:,} are one record")
        try:
            with open(self._paths[file], "rb", buffering=0) as opened:
                data = os.pread(opened.fileno(), end - start, start)
        except OSError as error:
            return BadRecord(place, f"cannot be read ({error.strerror})")
        if not data.strip():
            return BadRecord(place, "is empty")
        try:
            record = parse_json(data, max_depth=MAX_RECORD_DEPTH, max_items=MAX_RECORD_ITEMS)
        except JsonError as error:
            return BadRecord(place, str(error))
        if not isinstance(record, dict):
            return BadRecord(place, f"is {type(record).__name__}, not an object")
        return record


class TextField:
    """The texts in one field of records that are objects."""

    def __init__(self, records: Records, field: str) -> None:
        self._records, self._field = records, field
        self.place = records.place

    def __len__(self) -> int:
        return len(self._records)

    def read(self, number: int) -> str | BadRecord:
        record = self._records.read(number)
        if isinstance(record, BadRecord):
            return record
        if self._field not in record:
            names = ", ".join(map(repr, sorted(record)[:8])) or "none"
            return BadRecord(self.place(number), f"has no field {self._field!r} (its fields: {names})")
        text = record[self._field]
        if not isinstance(text, str):
            kind = type(text).__name__
            return BadRecord(self.place(number), f"holds {kind} in the field {self._field!r}, not a text")
        return text


class ParquetRecords:
    """A column of texts in Parquet files, held in memory: rows are wanted in an order that no file has.

    Raises:
        DataError: pyarrow is not installed; files that cannot be read, lack the column, or hold something
            else in it; more than `max_bytes` of it. All problems of the files at once.
    """

    def __init__(self, paths: Sequence[Path], column: str, max_bytes: int) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            why = "pyarrow is not installed; pip install 'dsv4_jax[parquet]' brings it"
            raise DataError("cannot read Parquet files", [why]) from None
        problems = []
        texts = (pyarrow.string(), pyarrow.large_string())
        for path in paths:
            try:
                schema = pyarrow.parquet.read_schema(path)
            except (OSError, pyarrow.ArrowException) as error:
                problems.append(f"{path}: is no Parquet file that can be read ({str(error).splitlines()[0]})")
                continue
            if column not in schema.names:
                problems.append(
                    f"{path}: has no column {column!r} (its columns: {', '.join(schema.names[:8])})"
                )
            elif schema.field(column).type not in texts:
                problems.append(f"{path}: column {column!r} holds {schema.field(column).type}, not text")
        if not problems and (size := sum(_column_bytes(path, column) for path in paths)) > max_bytes:
            problems.append(
                f"column {column!r} takes {size:,} bytes, more than max_bytes={max_bytes:,}; "
                f"a token file (token_files.write_token_file) is not held in memory"
            )
        if problems:
            raise DataError("cannot read Parquet files", problems)
        self._paths = paths
        self._columns = [pyarrow.parquet.read_table(path, columns=[column])[column] for path in paths]
        self._first = list(itertools.accumulate(map(len, self._columns), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def place(self, number: int) -> str:
        file = bisect.bisect_right(self._first, number) - 1
        return f"{self._paths[file]}, row {number - self._first[file] + 1}"

    def read(self, number: int) -> str | BadRecord:
        file = bisect.bisect_right(self._first, number) - 1
        try:
            text = self._columns[file][number - self._first[file]].as_py()
        except UnicodeDecodeError as error:
            return BadRecord(self.place(number), f"is not UTF-8 (byte {error.start}: {error.reason})")
        return BadRecord(self.place(number), "is null") if text is None else text


def _line_starts(path: Path) -> np.ndarray:
    """i64[lines + 1]: where each line starts, and the end of the file."""
    starts, place = [np.zeros(1, np.int64)], 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            starts.append(place + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
            place += len(chunk)
    found = np.concatenate(starts)
    return found if found[-1] == place else np.append(found, place)


def _column_bytes(path: Path, column: str) -> int:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        index = metadata.schema.to_arrow_schema().names.index(column)
        return sum(group.column(index).total_uncompressed_size for group in groups)
