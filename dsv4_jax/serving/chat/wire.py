"""What a client sent, read with a path for every problem: the tools of the conversions from wire formats."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_jax.errors import ProblemsError
from dsv4_jax.reading.strict_json import shown
from dsv4_jax.serving.chat import call_values
from dsv4_jax.serving.chat.messages import Tool

MAX_DEPTH = 64
MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_CALLS = 128
MAX_SCHEMA_CHARS = 256 * 1024
MAX_NAME_CHARS = 64
MAX_INTEGER_BITS = 14_000  # Python writes and reads integers of up to 4300 digits
_NAME_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


class RequestError(ProblemsError):
    """A request that is refused, with every problem as `path: what is wrong`."""


class Problems(list):
    """Problems found so far, each `path: what is wrong`. What clients sent is named, never repeated, except
    a word that should be one of a few."""

    def say(self, path: str, what: str) -> None:
        self.append(f"{path}: {what}")

    def text(self, path: str, value: object, *, default: str = "") -> str:
        """A text of whole characters; `default` after a problem."""
        if not isinstance(value, str):
            self.say(path, f"must be a string, not {kind(value)}")
            return default
        try:
            value.encode()
        except UnicodeEncodeError:
            self.say(path, "holds half of a surrogate pair, which is no character")
            return default
        return value

    def object(self, path: str, value: object) -> Mapping[str, Any] | None:
        if isinstance(value, Mapping):
            return value
        self.say(path, f"must be an object, not {kind(value)}")
        return None

    def array(self, path: str, value: object, most: int | None = None) -> Sequence[Any]:
        if not isinstance(value, (list, tuple)):
            self.say(path, f"must be an array, not {kind(value)}")
            return ()
        if most is not None and len(value) > most:
            self.say(path, f"has {len(value)} elements; at most {most} are accepted")
            return ()
        return value

    def flag(self, path: str, value: object, default: bool = False) -> bool:
        if value is None:
            return default
        if not isinstance(value, bool):
            self.say(path, f"must be true or false, not {kind(value)}")
            return default
        return value

    def one_of(self, path: str, value: object, allowed: Sequence[str]) -> str | None:
        if isinstance(value, str) and value in allowed:
            return value
        words = ", ".join(allowed)
        if isinstance(value, str):
            self.say(path, f"{shown(value)} must be one of {words}")
        else:
            self.say(path, f"must be one of {words}, not {kind(value)}")
        return None

    def json(self, path: str, value: object) -> Any:
        """A JSON value of whole characters, finite numbers and bounded depth; None after a problem."""
        problem = json_problem(value)
        if problem:
            self.say(path, problem)
            return None
        return value

    def arguments(self, path: str, text: str) -> None:
        """Arguments of an earlier call: any text, but an object must be one that can be rendered."""
        try:
            value = call_values.loads_finite(text)
        except call_values.NotFinite as error:
            self.say(path, str(error))
            return
        except (ValueError, RecursionError):
            return
        if not isinstance(value, dict):
            return
        self.json(path, value)
        for name in value:
            if problem := call_values.name_problem(name):
                self.say(path, problem)
                return

    def name(self, path: str, value: object) -> str:
        """A name of a tool."""
        name = self.text(path, value, default="?")
        if not 0 < len(name) <= MAX_NAME_CHARS or not _NAME_CHARS.issuperset(name):
            if isinstance(value, str):
                self.say(path, f"must be 1 to {MAX_NAME_CHARS} letters, digits, '_', '.' or '-'")
            return "?"
        return name

    def tool(self, path: str, function: object, schema_key: str = "parameters") -> Tool:
        """A tool whose description is `function`; `schema_key` is how its schema is called in paths."""
        before = len(self)
        found = self.object(path, function)
        if found is None:
            return Tool({"name": "?"})
        self.name(f"{path}.name", found.get("name"))
        if found.get("description") is not None:
            self.text(f"{path}.description", found["description"])
        parameters = found.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            self.say(f"{path}.{schema_key}", f"must be an object, not {kind(parameters)}")
        if len(self) == before:
            self.json(path, found)
        return Tool(dict(found) if len(self) == before else {"name": "?"})


def json_problem(value: object) -> str | None:
    """What is wrong with a JSON value; None if nothing is."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return None
        below: list[object] = []
        for each in level:
            if isinstance(each, Mapping):
                if not all(isinstance(key, str) for key in each):
                    return "has a key that is no string"
                below += [*each.keys(), *each.values()]
            elif isinstance(each, (list, tuple)):
                below += each
            elif isinstance(each, str):
                if not _is_unicode(each):
                    return "holds half of a surrogate pair, which is no character"
            elif isinstance(each, float):
                if not math.isfinite(each):
                    return "holds a number that is not finite"
            elif isinstance(each, int) and each.bit_length() > MAX_INTEGER_BITS:
                return "holds an integer of more digits than are accepted"
            elif each is not None and not isinstance(each, (bool, int)):
                return f"holds {kind(each)}, which is no JSON"
        level = below
    return f"is nested deeper than {MAX_DEPTH}"


def kind(value: object) -> str:
    """The JSON word for what a value is."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list() | tuple():
            return "an array"
        case Mapping():
            return "an object"
        case _:
            return type(value).__name__


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
