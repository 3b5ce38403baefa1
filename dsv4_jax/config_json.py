"""JSON files read strictly: duplicate keys and non-finite literals are problems, not guesses."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from dsv4_jax import errors

MAX_JSON_BYTES = 64 * 2**20
GIT_LFS_MARKER = b"version https://git-lfs.github.com/spec"


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """Stands for a `NaN` or `Infinity` literal, or a number beyond float64, in parsed JSON."""

    literal: str


def read_object(
    path: pathlib.Path, error: Callable[[str, list[str]], errors.ProblemsError]
) -> tuple[dict[str, object], list[str]]:
    """Reads a JSON object, collecting what other readers let pass.

    Args:
        path: the file.
        error: class of the exception for a file that holds no JSON object at all.

    Returns:
        (object, problems): a duplicate key keeps its first value, a non-finite number becomes a
        `NonFinite`; each such place gives a problem.

    Raises:
        error: the file is unreadable, too large, a git-LFS pointer, not UTF-8, not JSON, nested
            beyond the parser's depth, or not an object.
    """

    def refuse(problem: str) -> errors.ProblemsError:
        return error(f"cannot read {path}", [problem])

    try:
        if path.is_dir():
            raise refuse("it is a directory, not a JSON file")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise refuse(f"it holds {size} bytes; the limit is {MAX_JSON_BYTES}")
        data = path.read_bytes()
    except OSError as failure:
        raise refuse(failure.strerror or str(failure)) from failure
    if data.startswith(GIT_LFS_MARKER):
        raise refuse("it is a git-LFS pointer, not the file itself; download the real files")

    problems: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        kept: dict[str, object] = {}
        for key, value in items:
            if key in kept:
                problems.append(f"the JSON key {key!r} appears twice in one object")
            else:
                kept[key] = value
        return kept

    def constant(literal: str) -> NonFinite:
        problems.append(f"the JSON literal {literal} is not a number")
        return NonFinite(literal)

    def real(text: str) -> float | NonFinite:
        value = float(text)
        return value if abs(value) != float("inf") else constant(text[:40])

    try:
        parsed = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_float=real
        )
    except RecursionError as failure:
        raise refuse("its JSON is nested too deeply") from failure
    except UnicodeDecodeError as failure:
        raise refuse(f"it is not UTF-8 text (byte {failure.start})") from failure
    except ValueError as failure:  # JSONDecodeError, and integers beyond Python's digit limit
        raise refuse(f"it is not valid JSON: {failure}") from failure
    if not isinstance(parsed, dict):
        raise refuse(f"it holds a JSON {type(parsed).__name__}, not an object")
    return parsed, problems
