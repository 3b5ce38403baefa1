"""JSON from untrusted files: bounded, never recursive, and without silently dropped duplicate keys.

`json.loads` keeps the last of two equal keys, accepts NaN, recurses in C, and turns three bytes,
`[],`, into seventy. A checkpoint header or index has a known small depth and size, so all of that
is refused before an object is built.
"""

import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence

# Possessive, with an optional closing quote: never fails, hence never backtracks (linear time).
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict = 2, 10, 4
_REPR.maxstring, _REPR.maxlong, _REPR.maxother = 120, 40, 80


class JsonError(ValueError):
    """Text that is not JSON, or that is larger or deeper than its kind of file can be."""


class RepeatedKeys(dict):
    """An object in which a key occurs more than once; `names` lists those keys in order."""

    names: tuple[str, ...] = ()


def shown(value: object) -> str:
    """`value` for an error message: quoted, plain ASCII, cut to a few lines at most."""
    return plain(_REPR.repr(value))


def plain(text: str) -> str:
    """`text` in ASCII: file names may hold bytes that no terminal encoding can print."""
    return text.encode("ascii", "backslashreplace").decode()


def repeated_keys(value: object) -> tuple[str, ...]:
    """Keys that occur more than once in the parsed object `value` itself (not below it)."""
    return value.names if isinstance(value, RepeatedKeys) else ()


def parse_json(
    data: bytes,
    *,
    max_depth: int,
    max_items: int,
    not_a_number: Callable[[str], object] | None = None,
) -> object:
    """Parses UTF-8 JSON.

    Args:
        data: the whole document.
        max_depth: most nested objects and arrays; `{"a": [1]}` has depth 2.
        max_items: most commas, which bounds the number of Python objects made.
        not_a_number: given the literal of a NaN, an infinity or a number beyond float64, returns what stands
            in its place; None refuses the document.

    Returns:
        The value; an object with repeated keys is a `RepeatedKeys` with the last value of each.

    Raises:
        JsonError: not UTF-8, not JSON, too deep, too many items, a number that is not finite
            (unless `not_a_number`), or an integer of more digits than Python converts.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8 (byte {error.start}: {error.reason})") from None
    skeleton = _STRING.sub(b"", data)
    if skeleton.count(b",") > max_items:
        raise JsonError(f"has {skeleton.count(b',')} commas; at most {max_items} are accepted")
    if _deeper_than(skeleton.translate(None, _NOT_BRACKETS), max_depth):
        raise JsonError(f"has unbalanced brackets or is nested deeper than {max_depth}")
    not_a_number = not_a_number or _refuse_number

    def real(literal: str) -> object:
        value = float(literal)
        return value if math.isfinite(value) else not_a_number(literal)

    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=not_a_number, parse_float=real)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonError(f"is not JSON ({shown(str(error))[1:-1]})") from None


def _deeper_than(brackets: bytes, max_depth: int) -> bool:
    # Each round removes the innermost pairs of one depth, in C, whatever the input.
    for _ in range(max_depth):
        if not brackets:
            return False
        brackets = _without_innermost(brackets)
    return bool(brackets)


def _without_innermost(brackets: bytes) -> bytes:
    # A dot keeps pairs that only now become adjacent for the next round.
    return brackets.replace(b"[]", b".").replace(b"{}", b".").replace(b".", b"")


def _object(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    seen: set[str] = set()
    names = dict.fromkeys(name for name, _ in pairs if name in seen or seen.add(name))
    repeated = RepeatedKeys(result)
    repeated.names = tuple(names)
    return repeated


def _refuse_number(literal: str) -> object:
    raise JsonError(f"holds {literal[:40]}, which is not a finite number")
