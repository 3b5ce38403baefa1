"""The grammars of answers that a request asks for, in Lark for llguidance: JSON, and V4's tool calls.

A grammar of calls is over the model's own markup. A parameter that is a plain string stands as it is; any
other value is JSON of its schema behind `string="false"`, which the parser reads as such, strings in quotes
included. Parameters come in the order of the schema. Schemas are checked first: what is not honoured is
refused.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv4_jax.serving.chat.call_values import name_problem
from dsv4_jax.serving.chat.messages import Tool, json_text
from dsv4_jax.serving.chat.wire import Problems

MAX_SCHEMA_BYTES = 256 * 1024
MAX_SCHEMAS = 10_000
MAX_ENUM = 5_000
MAX_PARAMETER_NAME = 256

NEXT, CLOSE = "\n<", "\n</"
"""What stands before the marker of a tag that begins something, and of one that ends something."""

_ANNOTATIONS = frozenset(
    "$comment $schema title description default examples deprecated readOnly writeOnly".split()
)
_VALUES = frozenset(
    "type enum const required minProperties maxProperties minItems maxItems minLength maxLength pattern"
    " format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf $ref".split()
)
_ONE = ("items", "additionalProperties", "additionalItems")
_MANY = ("anyOf", "allOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_KNOWN = _ANNOTATIONS | _VALUES | {*_ONE, *_MANY, *_NAMED}
_AT_TOP = _ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}

WHITESPACE = {"whitespace_flexible": True, "whitespace_pattern": r"\n? {0,32}"}
"""Between the tokens of JSON: a new line and an indentation; an answer cannot be spaces without end."""


def check_schema(path: str, schema: Any, problems: Problems) -> None:
    """Tells `problems` what of a schema is beyond a limit or not honoured here, each with its path."""
    if len(json_text(schema).encode()) > MAX_SCHEMA_BYTES:
        problems.say(path, f"is larger than {MAX_SCHEMA_BYTES} bytes")
        return
    count = choices = 0
    for where, each in _schemas(path, schema):
        count += 1
        if not isinstance(each, Mapping):
            if not isinstance(each, bool):
                problems.say(where, "must be a schema: an object or a boolean")
            continue
        for key in each.keys() - _KNOWN:
            known = key if len(key) <= 64 and key.isascii() and key.isprintable() else "a keyword of it"
            problems.say(where, f"{known} is not supported in a schema that the answer must keep")
        if isinstance(each.get("enum"), (list, tuple)):
            choices += len(each["enum"])
        if "$ref" in each and not (isinstance(each["$ref"], str) and each["$ref"].startswith("#")):
            problems.say(where, "$ref must point into the same schema, by #")
    if count > MAX_SCHEMAS:
        problems.say(path, f"has {count} schemas in it; at most {MAX_SCHEMAS} are accepted")
    if choices > MAX_ENUM:
        problems.say(path, f"has {choices} values in its enums; at most {MAX_ENUM} are accepted")


def _schemas(path: str, schema: Any) -> Iterator[tuple[str, Any]]:
    """A schema and all schemas in it, with their paths."""
    waiting = [(path, schema)]
    while waiting:
        where, each = waiting.pop()
        yield where, each
        if isinstance(each, Mapping):
            waiting += [(f"{where}.{step}", inner) for step, inner in _inner(each)]


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in _ONE:
        if key in schema:
            if key == "items" and isinstance(schema[key], (list, tuple)):  # of older drafts
                yield from ((f"items[{i}]", inner) for i, inner in enumerate(schema[key]))
            else:
                yield key, schema[key]
    for key in _MANY:
        if isinstance(schema.get(key), (list, tuple)):
            yield from ((f"{key}[{i}]", inner) for i, inner in enumerate(schema[key]))
    for key in _NAMED:
        if isinstance(schema.get(key), Mapping):
            yield from ((key, inner) for inner in schema[key].values())


def check_tool(path: str, tool: Tool, problems: Problems) -> None:
    """As `check_schema`, of the parameters of a tool whose calls a grammar has to write."""
    schema = tool.parameters
    before = len(problems)
    check_schema(path, schema, problems)
    if len(problems) > before:
        return
    for key in schema.keys() - _AT_TOP:
        problems.say(path, f"{key} is not supported at the top of a tool's schema with this tool_choice")
    if schema.get("type", "object") != "object":
        problems.say(f"{path}.type", "must be object")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping):
        problems.say(f"{path}.properties", "must be an object")
        return
    if not isinstance(required, (list, tuple)) or not all(
        isinstance(each, str) and each in properties for each in required
    ):
        problems.say(f"{path}.required", "must be an array of names that properties has")
    for name in properties:
        if len(name) > MAX_PARAMETER_NAME:
            problems.say(f"{path}.properties", f"has a name of more than {MAX_PARAMETER_NAME} characters")
        if (problem := name_problem(name)) is not None:
            problems.say(f"{path}.properties", problem)


@dataclasses.dataclass(frozen=True)
class Marker:
    """How a grammar names the marker of V4's tags, a token: as text it could stand in a value."""

    token_id: int

    def tag(self, before: str, after: str) -> str:
        """The text of a tag around its marker, as a sequence of a rule."""
        return f"{_quoted(before)} <[{self.token_id}]> {_quoted(after)}"

    def raw_then_close(self) -> str:
        """A string as it is, to the end of its parameter; RAW ends with the beginning of the closing tag."""
        return f'RAW <[{self.token_id}]> "parameter>"'


def json_rule(schema: Any) -> str:
    """The rule of a JSON value that keeps a schema."""
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": WHITESPACE}
    return f"%json {json.dumps(schema)}"


def answer_text(
    schema: Any | None, tools: Sequence[Tool], marker: Marker | None, most_calls: int | None
) -> str:
    """The grammar of an answer that is a JSON value, or calls of tools, or either.

    Args:
        schema: of the value; None: calls alone. tools: none: the value alone.
        marker: of the tokenizer; None: there are no tools. most_calls: of the answer; None: any number.
    """
    choices = (["answer"] if schema is not None else []) + (["calls"] if tools else [])
    lines = [f"start: {' | '.join(choices)}"]
    if schema is not None:
        lines.append(f"answer: {json_rule(schema)}")
    if tools and marker is not None:
        lines += _calls(tools, marker, most_calls)
    return "\n".join(lines) + "\n"


def _calls(tools: Sequence[Tool], marker: Marker, most: int | None) -> list[str]:
    # Lexemes are read to their longest end: no tag may begin with another lexeme that can stand in its place.
    repeated = "*" if most is None else f"{{0,{most - 1}}}"
    again = f"({marker.tag(NEXT, 'invoke name=')} call){repeated}" if most != 1 else ""
    first = f'{marker.tag(chr(10) + NEXT, "tool_calls>" + NEXT)} <[{marker.token_id}]> "invoke name="'
    lines = [f"calls: {first} call {again} {marker.tag(CLOSE, 'tool_calls>')}"]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    lines.append(r"RAW: /(?s:.*)<\//")
    for number, tool in enumerate(tools):
        lines += _call(number, tool, marker)
    return lines


def _call(number: int, tool: Tool, marker: Marker) -> list[str]:
    """Rules of one tool: `begin_k` writes the parameters from the k-th on when none was written yet."""
    schema = tool.parameters
    properties, required = schema.get("properties", {}), schema.get("required", [])
    name = f"c{number}"
    end = marker.tag(CLOSE, "invoke>")
    lines = [f"call_{number}: {_quoted(json.dumps(tool.name) + '>' + chr(10))} {name}_begin_0"]
    last = len(properties)
    for place, (key, inner) in enumerate(properties.items()):
        needed = key in required
        value = f"{name}_value_{place}"
        begin = f"{marker.tag('<', 'parameter name=')} {value} {name}_more_{place + 1}"
        more = f"{marker.tag(NEXT, 'parameter name=')} {value} {name}_more_{place + 1}"
        lines.append(f"{name}_begin_{place}: {begin}" + ("" if needed else f" | {name}_begin_{place + 1}"))
        lines.append(f"{name}_more_{place}: {more}" + ("" if needed else f" | {name}_more_{place + 1}"))
        quoted = f'"{key}" string='
        if _is_plain(inner):
            opening = _quoted(quoted + '"true">')
            lines.append(f"{value}: {opening} {marker.raw_then_close()}")
        else:
            opening = _quoted(quoted + '"false">')
            lines.append(f"{value}: {opening} {value}_json {marker.tag('</', 'parameter>')}")
            lines.append(f"{value}_json: {json_rule(_alone(schema, inner))}")
    return [*lines, f"{name}_begin_{last}: {end}", f"{name}_more_{last}: {end}"]


def _is_plain(schema: Any) -> bool:
    """Whether every text keeps a schema, and nothing else does."""
    if not isinstance(schema, Mapping) or schema.get("type") != "string":
        return False
    return not schema.keys() - _ANNOTATIONS - {"type"}


def _alone(root: Mapping[str, Any], schema: Any) -> Any:
    """A schema of a property, with what it refers to in the root."""
    if not isinstance(schema, Mapping):
        return {} if schema else {"anyOf": []}
    if not any("$ref" in each for _, each in _schemas("", schema) if isinstance(each, Mapping)):
        return schema
    # References are from the root: the root goes along, under a name of its own, with its references moved.
    return {"$defs": {"root": _moved(root)}, "allOf": [_moved(schema)]}


def _moved(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    if "$ref" in found:
        found["$ref"] = "#/$defs/root" + found["$ref"].removeprefix("#")
    for key in _ONE:
        if key in found:
            many = isinstance(found[key], (list, tuple))
            found[key] = [_moved(each) for each in found[key]] if many else _moved(found[key])
    for key in _MANY:
        if isinstance(found.get(key), (list, tuple)):
            found[key] = [_moved(each) for each in found[key]]
    for key in _NAMED:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _moved(each) for name, each in found[key].items()}
    return found


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
