"""Hostile JSON: refused in linear time and bounded memory, duplicates kept visible."""

import sys
import time

import pytest

from dsv4_jax.reading.strict_json import JsonError, parse_json, repeated_keys, shown


def parse(data: bytes, max_depth: int = 3, max_items: int = 1000) -> object:
    return parse_json(data, max_depth=max_depth, max_items=max_items)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": [1, 2.5, "x", null, true]}', {"a": [1, 2.5, "x", None, True]}),
        (b'{"a": {"b": [[]]}}', None),  # depth 4
        (b'{"a": {"b": []}}', {"a": {"b": []}}),  # depth 3
        (b'{"]}]}": "[[[[\\"[["}', {"]}]}": '[[[["[['}),  # brackets in strings do not count
        (b'  {"a": "\\\\"}  ', {"a": "\\"}),
        ('{"ä": "\U0001f600"}'.encode(), {"ä": "\U0001f600"}),
        (b"[]{}", None),
        (b"[}", None),
        (b"", None),
        (b"7", 7),
        (b'{"a": NaN}', None),
        (b'{"a": -Infinity}', None),
        (b'{"a": 1e999}', None),
        (b'{"a": 1,}', None),
        (b"{'a': 1}", None),
        (b'{"a": 01}', None),
        (b'{"a": "\n"}', None),  # a raw control character
        (b"\xef\xbb\xbf{}", None),  # byte order mark
        (b'{"\xff": 1}', None),
        (b'{"a": ' + b"1" * 5000 + b"}", None),  # more digits than Python converts
    ],
)
def test_accepts_json_and_nothing_else(data: bytes, expected: object) -> None:
    if expected is None:
        with pytest.raises(JsonError):
            parse(data)
    else:
        assert parse(data) == expected


def test_what_stands_for_a_number_that_is_not_finite() -> None:
    data, found = b'{"a": [NaN, -1e400, 1e-400, 2.5]}', []
    value = parse_json(data, max_depth=2, max_items=9, not_a_number=found.append)
    assert value == {"a": [None, None, 0.0, 2.5]} and found == ["NaN", "-1e400"]


def test_repeated_keys_are_seen_in_their_own_object_only() -> None:
    value = parse(b'{"a": 1, "b": {"c": 1, "c": 2, "d": 3, "c": 4, "d": 5}, "a": 2}')
    assert repeated_keys(value) == ("a",)
    assert value["a"] == 2
    assert repeated_keys(value["b"]) == ("c", "d")
    assert repeated_keys(parse(b'{"a": {"a": {}}}')) == ()
    assert repeated_keys([1]) == ()
    # an escape spells the same key
    assert repeated_keys(parse(b'{"a": 1, "\\u0061": 2}')) == ("a",)


def test_item_limit_is_exact() -> None:
    assert len(parse(b"[" + b"1," * 10 + b"1]", max_items=10)) == 11
    with pytest.raises(JsonError, match="10 commas; at most 9"):
        parse(b"[" + b"1," * 10 + b"1]", max_items=9)
    assert parse(b'["' + b"," * 50 + b'"]', max_items=0) == ["," * 50]


@pytest.mark.parametrize(
    "data",
    [
        b'"' + b'\\"' * 2_000_000,  # a backtracking pattern is quadratic here
        b'"' * 3_000_001,
        b"\\" * 3_000_000,
        b"[" * 3_000_000,
        b'{"a":' * 600_000,
        b"[" * 1_000_000 + b"]" * 1_000_000,
        b"[{" * 1_000_000 + b"}]" * 1_000_000,
        b"[" + b"[]," * 1_000_000 + b"[]]",
        b'{"a":' * 3 + b"1" * 3_000_000 + b"}" * 3,
    ],
)
def test_bombs_are_refused_quickly(data: bytes) -> None:
    # A raised recursion limit turns deep nesting into a crash of the interpreter, unless it is
    # refused before the recursive parser sees it.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    start = time.perf_counter()
    try:
        with pytest.raises(JsonError):
            parse(data)
    finally:
        sys.setrecursionlimit(limit)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, ["y" * 500] * 100, 10**4000, {"\ud800": "\0"}, [[[[1]]]], "\n\x1b[31m \u0430"],
)
def test_shown_is_short_and_printable(value: object) -> None:
    text = shown(value)
    assert len(text) < 1500
    assert text.isascii()
    assert text.isprintable()
