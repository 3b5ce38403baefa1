"""One tool call while it is read: its parameters become the events of a call, at its end or as they come."""

import secrets
from collections.abc import Callable, Mapping

from dsv4_jax.serving.chat.answer import Event, ToolArguments, ToolStart
from dsv4_jax.serving.chat.call_values import WRAPPERS, Parameter, argument_json, arguments_of
from dsv4_jax.serving.chat.messages import Tool, json_text


def call_id() -> str:
    """A new id of a call."""
    return f"call_{secrets.token_hex(12)}"


class OpenCall:
    """A call whose end has not come yet.

    Args:
        name: that the model wrote.
        tool: of that name; None if there is none, and then the call has no events.
        index: of the call in the answer.
        new_id: makes its id when it is given out.
        streams: give strings out while they are written. Of a parameter that is written twice the first one
            then counts, since it is out already; otherwise the last one.

    Attributes:
        repeated: parameters that were written again.
        nameless: parameters without a name; they are dropped.
    """

    def __init__(
        self, name: str, tool: Tool | None, index: int, new_id: Callable[[], str], streams: bool
    ) -> None:
        self.name, self.tool = name, tool
        self.repeated = self.nameless = 0
        self._index, self._new_id = index, new_id
        self._streams = streams and tool is not None
        self._parameters: list[Parameter] = []  # complete, and not given out
        self._name: str | None = None
        self._is_string: bool | None = None
        self._value: list[str] = []
        self._live = False  # the value that is being written is given out as it comes
        self._newline = ""  # at the end of a live value: not part of it if its own end is missing
        self._written: set[str] = set()

    @property
    def missing(self) -> bool:
        """Whether a required parameter has not been given."""
        required = None if self.tool is None else self.tool.parameters.get("required")
        given = {parameter.name for parameter in self._parameters} | self._written
        names = required if isinstance(required, (list, tuple)) else ()
        return any(isinstance(name, str) and name not in given for name in names)

    @property
    def started(self) -> bool:
        """Whether something of it has been given out."""
        return bool(self._written) or self._live

    def texts(self) -> str:
        """The values that were read and not given out."""
        return "".join([*(parameter.value for parameter in self._parameters), *self._value])

    def begin(self, name: str | None, is_string: bool | None) -> list[Event]:
        """A value begins."""
        self._name, self._is_string, self._value = name, is_string, []
        if not self._streams or name is None or self._may_wrap(name):
            return []
        events = self._given_out()
        self._live = is_string is True and name not in self._written
        if self._live:
            events += self._pair(name, '"')
        return events

    def more(self, text: str) -> list[Event]:
        """More of the value."""
        if not self._live:
            self._value.append(text)
            return []
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        return self._text(json_text(text.removesuffix("\n"))[1:-1])

    def end_value(self, cut: bool) -> list[Event]:
        """The value is over; `cut`: without its own end, before which a newline would stand."""
        if self._live:
            self._live = False
            rest = "" if cut else json_text(self._newline)[1:-1]
            self._newline = ""
            return self._text(rest + '"')
        value, self._value = "".join(self._value), []
        if self._name is None:
            self.nameless += 1
            return []
        value = value.removesuffix("\n") if cut else value
        self._parameters.append(Parameter(self._name, value, self._is_string))
        return self._given_out() if self._streams and not self._may_wrap(self._name) else []

    def end(self) -> list[Event]:
        """The call is over."""
        if self.tool is None:
            return []
        if self._written:
            return [*self._given_out(), *self._text("}")]
        arguments, repeated = arguments_of(self._parameters, self.tool.parameters)
        self.repeated += repeated
        return [self._start(), *self._text(arguments)]

    def _may_wrap(self, name: str) -> bool:
        """Whether the first parameter may turn out to hold the whole object."""
        properties = self.tool.parameters.get("properties")
        wraps = name in WRAPPERS and (not isinstance(properties, Mapping) or name not in properties)
        return wraps and not self._written and all(each.name == name for each in self._parameters)

    def _given_out(self) -> list[Event]:
        events = []
        for parameter in self._parameters:
            if parameter.name in self._written:
                self.repeated += 1
            else:
                events += self._pair(parameter.name, argument_json(parameter))
        self._parameters = []
        return events

    def _pair(self, name: str, value: str) -> list[Event]:
        start = [] if self._written else [self._start()]
        before = ", " if self._written else "{"
        self._written.add(name)
        return [*start, *self._text(f"{before}{json_text(name)}: {value}")]

    def _start(self) -> ToolStart:
        return ToolStart(self._index, self._new_id(), self.name)

    def _text(self, text: str) -> list[Event]:
        return [ToolArguments(self._index, text)] if text else []
