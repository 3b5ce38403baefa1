"""The values of a tool call, in both directions: JSON arguments to parameters of the prompt, and back.

In a prompt a string stands as it is and everything else as JSON; a flag says which. There is no escaping.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dsv4_jax.serving.chat.messages import json_text

RAW = "arguments"
"""Name of the one parameter that holds arguments which are no JSON object."""

WRAPPERS = (RAW, "input")
"""Names under which a model sometimes gives the whole object as one parameter."""

_FORBIDDEN_IN_NAMES = '"<>\n\r'


class Parameter(NamedTuple):
    """One parameter of a call as it stands in a prompt. `is_string` None: the model did not say."""

    name: str
    value: str
    is_string: bool | None


class NotFinite(ValueError):
    """A number that JSON does not have, or that float64 cannot hold."""


def parameters_of(arguments: str) -> list[Parameter]:
    """The parameters that stand for a JSON text of arguments.

    An empty text has none. Text that is no JSON object (also one with NaN, an infinity, or an integer of more
    digits than Python converts) becomes one parameter of that text.
    """
    if not arguments.strip():
        return []
    try:
        value = loads_finite(arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return [Parameter(RAW, arguments, True)]
    return [
        Parameter(name, each if isinstance(each, str) else json_text(each), isinstance(each, str))
        for name, each in value.items()
    ]


def arguments_of(parameters: Iterable[Parameter], schema: Mapping[str, Any]) -> tuple[str, int]:
    """The arguments of a call that a model wrote.

    Args:
        parameters: in the order in which they were written; the last of a name wins.
        schema: of the tool's parameters.

    Returns:
        (JSON text of an object, how many parameters were overwritten). A value that is not JSON although it
        should be becomes a JSON string; a valid one keeps its digits.
    """
    last: dict[str, Parameter] = {}
    repeated = 0
    for parameter in parameters:
        repeated += parameter.name in last
        last[parameter.name] = parameter
    if (whole := _unwrapped(last, schema)) is not None:
        return whole, repeated
    pairs = (f"{json_text(name)}: {argument_json(parameter)}" for name, parameter in last.items())
    return "{" + ", ".join(pairs) + "}", repeated


def loads_finite(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        NotFinite: a number in it is NaN, infinite or beyond float64.
        ValueError: it is not JSON, or an integer has more digits than Python converts.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def name_problem(name: str) -> str | None:
    """What is wrong with the name of an argument: in a prompt it stands between quotes, without escapes."""
    found = sorted(set(name) & set(_FORBIDDEN_IN_NAMES))
    return f"a name of an argument may not hold {' '.join(map(repr, found))}" if found else None


def argument_json(parameter: Parameter) -> str:
    """The JSON text of a value: of a string, and of what should be JSON and is not, a JSON string."""
    if parameter.is_string is not True and (literal := _valid_json(parameter.value)) is not None:
        return literal
    return json_text(parameter.value)


def _valid_json(text: str) -> str | None:
    """The text without spaces around it, if it is JSON whose numbers are finite and whose text is Unicode."""
    text = text.strip(" \t\r\n")
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_zero)
        if "\\ud" in text.lower():
            json_text(value).encode()  # an escaped half of a character
    except (ValueError, RecursionError):
        return None
    return text


def _unwrapped(parameters: Mapping[str, Parameter], schema: Mapping[str, Any]) -> str | None:
    """The object inside a single parameter that only wraps it: one that the schema does not have, with keys
    that it does have."""
    properties = schema.get("properties")
    if len(parameters) != 1 or not isinstance(properties, Mapping) or not properties:
        return None
    ((name, parameter),) = parameters.items()
    if name not in WRAPPERS or name in properties:
        return None
    text = _valid_json(parameter.value)
    if text is None or not text.startswith("{"):
        return None
    inner = json.loads(text, parse_int=_zero, parse_float=_zero)
    return text if inner.keys() <= properties.keys() else None


def _refuse(literal: str) -> None:
    raise NotFinite(f"{literal} is not a finite number")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise NotFinite("a number is beyond float64")
    return value


def _zero(literal: str) -> int:
    return 0
