"""JSON objects read strictly: duplicate keys and non-finite literals are problems, not guesses."""

import dataclasses
from collections.abc import Iterator

from dsv4_jax.reading.strict_json import JsonError, parse_json, repeated_keys

MAX_JSON_BYTES = 16 * 2**20  # released configs: some KB; a tokenizer_config.json: some 100 KB at most
MAX_DEPTH, MAX_ITEMS = 32, 2**20  # released configs: depth 3, some hundred items


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """Stands for a `NaN` or `Infinity` literal, or a number beyond float64, in parsed JSON."""

    literal: str


def parse_object(data: bytes) -> tuple[dict[str, object], list[str]]:
    """Parses a JSON object, collecting what other readers let pass.

    Returns:
        (object, problems): a duplicate key keeps its last value, a non-finite number becomes a
        `NonFinite`; each such place gives a problem.

    Raises:
        JsonError: not UTF-8, not JSON, nested deeper than MAX_DEPTH, longer than MAX_ITEMS, or not an object.
    """
    problems: list[str] = []

    def not_a_number(literal: str) -> NonFinite:
        problems.append(f"the JSON literal {literal[:40]} is not a number")
        return NonFinite(literal[:40])

    parsed = parse_json(data, max_depth=MAX_DEPTH, max_items=MAX_ITEMS, not_a_number=not_a_number)
    if not isinstance(parsed, dict):
        raise JsonError(f"holds a JSON {type(parsed).__name__}, not an object")
    problems += [f"the JSON key {key!r} appears twice in one object" for key in _repeated(parsed)]
    return parsed, problems


def _repeated(value: object) -> Iterator[str]:
    """Repeated keys of an object and of everything below it."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for inner in below:
        yield from _repeated(inner)
    yield from repeated_keys(value)
