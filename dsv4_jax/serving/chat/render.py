"""From messages to the prompt: a list of pieces, each a control token or a run of ordinary text.

The layout is that of the official encoder (chat format of DeepSeek-V4), held by its published examples.
Text of clients is only ever appended to a run, so that no words of theirs can become a control token.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsv4_jax.errors import ProblemsError
from dsv4_jax.reading.strict_json import shown
from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.call_values import parameters_of
from dsv4_jax.serving.chat.messages import Message, Text, ToolCall, ToolResult, Unsupported, json_text
from dsv4_jax.serving.chat.profile import Profile

TURNS = ("user", "developer")
"""Roles after which the assistant speaks."""


class Piece(NamedTuple):
    """A control token, or a run of ordinary text between two of them."""

    text: str
    is_control: bool


class _Pieces:
    """The prompt so far. Neighbouring runs of text are one: byte pairs are merged across their border."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._run: list[str] = []

    def text(self, text: str) -> None:
        self._run.append(text)

    def glue(self, text: str) -> None:
        """Text of the format itself, in which control strings are meant."""
        for index, part in enumerate(control.split_control(text)):
            if index % 2:
                self._end_run()
                self._pieces.append(Piece(part, True))
            else:
                self.text(part)

    def finish(self) -> tuple[Piece, ...]:
        self._end_run()
        return tuple(self._pieces)

    def _end_run(self) -> None:
        if run := "".join(self._run):
            self._pieces.append(Piece(run, False))
        self._run.clear()


def render(
    messages: Sequence[Message],
    profile: Profile,
    *,
    thinking: bool = True,
    effort: str | None = None,
    drop_thinking: bool = True,
) -> tuple[Piece, ...]:
    """The prompt of a conversation.

    Args:
        messages: with tools and a response schema already at their places (`messages.placed`).
        profile: words and efforts of the model's release.
        thinking: whether the assistant reasons before it answers.
        effort: how much, one of "low", "high" and "max"; None is the profile's own.
        drop_thinking: leaves reasoning before the last turn of a user out, unless a message has tools.

    Raises:
        ProblemsError: for an effort or a task that there is not, or a developer message without text.
    """
    effort = profile.default_effort if effort is None else effort
    if problems := _problems(messages, profile, effort):
        raise ProblemsError("the conversation cannot be rendered", problems)
    messages = _merged(messages)
    has_tools = any(message.tools for message in messages if message.role != "user")
    drop = thinking and drop_thinking and not has_tools
    if drop:
        messages = _without_old_thinking(messages)
    last_turn = _last_turn(messages)
    out = _Pieces()
    out.glue(control.BOS)
    if thinking:
        out.glue(profile.effort_prefixes[effort])
    for index, message in enumerate(messages):
        previous = messages[index - 1] if index else None
        reasons = thinking and (previous is None or previous.task is None)
        _add_message(out, message, profile, reasons and (not drop or index > last_turn))
        following = messages[index + 1].role if index + 1 < len(messages) else None
        if following in (None, "assistant", "latest_reminder"):
            opens_thinking = thinking and (not drop or index >= last_turn)
            _add_what_follows(out, message, thinking, opens_thinking)
    return out.finish()


def text_of(pieces: Iterable[Piece]) -> str:
    """The prompt as one string. Encode `pieces` instead: here control strings and text are alike."""
    return "".join(piece.text for piece in pieces)


def starts_reasoning(pieces: Sequence[Piece]) -> bool:
    """Whether the model goes on inside its reasoning."""
    return bool(pieces) and pieces[-1] == Piece(control.THINK, True)


def _problems(messages: Sequence[Message], profile: Profile, effort: str) -> list[str]:
    problems = []
    if effort not in profile.effort_prefixes:
        problems.append(f"effort {shown(effort)} must be one of {', '.join(profile.effort_prefixes)}")
    for index, message in enumerate(messages):
        if message.task is not None and message.task not in control.TASKS:
            tasks = ", ".join(control.TASKS)
            problems.append(f"messages[{index}].task: {shown(message.task)} must be one of {tasks}")
        if message.role == "developer" and not _texts(message.parts):
            problems.append(f"messages[{index}].content: a developer message needs text")
    return problems


def _merged(messages: Iterable[Message]) -> list[Message]:
    """Results of tools and texts of users that follow each other are one turn; results are in the order of
    the calls that they answer."""
    turns: list[tuple[Message, list, dict[str, int]]] = []  # first message, all parts, places of the calls
    order: dict[str, int] = {}
    for message in messages:
        before = turns[-1][0] if turns and turns[-1][0].role == "user" else None
        if message.role not in ("user", "tool"):
            if message.role == "assistant" and message.tool_calls:
                order = {call.id: place for place, call in enumerate(message.tool_calls) if call.id}
            turns.append((message, list(message.parts), order))
        elif before is None or (message.role == "user" and before.task is not None):
            turns.append((dataclasses.replace(message, role="user"), list(message.parts), order))
        else:
            turns[-1][1].extend(message.parts)
    return [
        dataclasses.replace(first, parts=_in_order_of_calls(tuple(parts), places))
        if first.role == "user"
        else first
        for first, parts, places in turns
    ]


def _in_order_of_calls(parts: tuple, order: dict[str, int]) -> tuple:
    places = [i for i, part in enumerate(parts) if isinstance(part, ToolResult)]
    if len(places) < 2 or not order:
        return parts
    results = sorted((parts[i] for i in places), key=lambda result: order.get(result.call_id, 0))
    sorted_parts = list(parts)
    for place, result in zip(places, results, strict=True):
        sorted_parts[place] = result
    return tuple(sorted_parts)


def _last_turn(messages: Sequence[Message]) -> int:
    return max((i for i, message in enumerate(messages) if message.role in TURNS), default=-1)


def _without_old_thinking(messages: Sequence[Message]) -> list[Message]:
    last_turn = _last_turn(messages)
    kept = []
    for index, message in enumerate(messages):
        if index < last_turn and message.role == "developer":
            continue
        if index < last_turn and message.role == "assistant":
            message = dataclasses.replace(message, reasoning=None)
        kept.append(message)
    return kept


def _texts(parts: Iterable) -> str:
    return "\n\n".join(part.text for part in parts if isinstance(part, Text))


def _add_message(out: _Pieces, message: Message, profile: Profile, shows_reasoning: bool) -> None:
    match message.role:
        case "system":
            out.text(_texts(message.parts))
            _add_tails(out, message, profile)
        case "developer":
            out.glue(control.USER)
            out.text(_texts(message.parts))
            _add_tails(out, message, profile)
        case "user":
            out.glue(control.USER)
            _add_blocks(out, message.parts)
        case "latest_reminder":
            out.glue(control.REMINDER)
            out.text(_texts(message.parts))
        case "assistant":
            _add_answer(out, message, shows_reasoning)
        case _:
            raise ProblemsError("the conversation cannot be rendered", [f"role {shown(message.role)}"])


def _add_tails(out: _Pieces, message: Message, profile: Profile) -> None:
    if message.tools:
        out.glue("\n\n")
        _add_filled(out, profile.tools_block, "\n".join(json_text(tool.function) for tool in message.tools))
    if message.response_schema is not None:
        out.glue("\n\n")
        _add_filled(out, profile.response_format, json_text(message.response_schema))


def _add_filled(out: _Pieces, template: tuple[str, str], words: str) -> None:
    """A template with the client's words in its gap; they are never searched for anything."""
    before, after = template
    out.glue(before)
    out.text(words)
    out.glue(after)


def _add_blocks(out: _Pieces, parts: Iterable) -> None:
    for index, part in enumerate(parts):
        if index:
            out.glue("\n\n")
        if isinstance(part, Text):
            out.text(part.text)
            continue
        out.glue("<tool_result>")
        out.text("\n\n".join(_result_text(each) for each in part.parts))
        out.glue("</tool_result>")


def _result_text(part: Text | Unsupported) -> str:
    return part.text if isinstance(part, Text) else f"[Unsupported {part.kind}]"


def _add_answer(out: _Pieces, message: Message, shows_reasoning: bool) -> None:
    if shows_reasoning:
        out.text(message.reasoning or "")
        out.glue(control.END_THINK)
    content = _texts(message.parts)
    # A model writes its calls after exactly two newlines, so that is how they are given back to it.
    out.text(content.rstrip("\n") if message.tool_calls else content)
    if message.tool_calls:
        out.glue(f"\n\n<{control.DSML}tool_calls>\n")
        for index, call in enumerate(message.tool_calls):
            out.glue("\n" if index else "")
            _add_call(out, call)
        out.glue(f"\n</{control.DSML}tool_calls>")
    if not message.unfinished:
        out.glue(control.EOS)


def _add_call(out: _Pieces, call: ToolCall) -> None:
    dsml = control.DSML
    out.glue(f'<{dsml}invoke name="')
    out.text(call.name)
    out.glue('">\n')
    for index, parameter in enumerate(parameters_of(call.arguments)):
        out.glue(f'\n<{dsml}parameter name="' if index else f'<{dsml}parameter name="')
        out.text(parameter.name)
        out.glue(f'" string="{"true" if parameter.is_string else "false"}">')
        out.text(parameter.value)
        out.glue(f"</{dsml}parameter>")
    out.glue(f"\n</{dsml}invoke>")


def _add_what_follows(out: _Pieces, message: Message, thinking: bool, opens_thinking: bool) -> None:
    """The header of the assistant's turn, or the token of a task. Only asked for where that comes next."""
    if message.task is not None and message.task != "action":
        out.glue(control.TASKS[message.task])
    elif message.task is not None:
        opened = control.THINK if thinking else control.END_THINK
        out.glue(control.ASSISTANT + opened + control.ACTION)
    elif message.role in TURNS:
        out.glue(control.ASSISTANT + (control.THINK if opens_thinking else control.END_THINK))
