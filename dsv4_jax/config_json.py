"""JSON files read strictly: duplicate keys and non-finite literals are problems, not guesses."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from dsv4_jax import errors
from dsv4_jax.strict_json import JsonError, parse_json, repeated_keys

MAX_JSON_BYTES = 64 * 2**20
MAX_DEPTH, MAX_ITEMS = 32, 2**20  # released configs: depth 3, some hundred items
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
        (object, problems): a duplicate key keeps its last value, a non-finite number becomes a
        `NonFinite`; each such place gives a problem.

    Raises:
        error: the file is unreadable, too large, a git-LFS pointer, not UTF-8, not JSON, nested
            deeper than MAX_DEPTH, longer than MAX_ITEMS, or not an object.
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

    def not_a_number(literal: str) -> NonFinite:
        problems.append(f"the JSON literal {literal[:40]} is not a number")
        return NonFinite(literal[:40])

    try:
        parsed = parse_json(data, max_depth=MAX_DEPTH, max_items=MAX_ITEMS, not_a_number=not_a_number)
    except JsonError as failure:
        raise refuse(f"it {failure}") from failure
    if not isinstance(parsed, dict):
        raise refuse(f"it holds a JSON {type(parsed).__name__}, not an object")
    problems += [f"the JSON key {key!r} appears twice in one object" for key in _repeated(parsed)]
    return parsed, problems


def _repeated(value: object) -> Iterator[str]:
    """Repeated keys of an object and of everything below it."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for inner in below:
        yield from _repeated(inner)
    yield from repeated_keys(value)
