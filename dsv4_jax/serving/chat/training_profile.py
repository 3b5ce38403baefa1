"""Chats for fine-tuning in the words in which the model is served.

What counts is what the model itself would write: after each assistant header its reasoning, its answer and
calls, and the end of the turn.
"""

from collections.abc import Sequence

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.from_openai import messages_from_openai
from dsv4_jax.serving.chat.profile import Profile
from dsv4_jax.serving.chat.render import render
from dsv4_jax.training.chat_records import ChatProfile, Piece


def training_profile(profile: Profile, *, thinking: bool = False, effort: str | None = None) -> ChatProfile:
    """A profile of the server for `training.sources.ChatFiles`.

    Args:
        profile: words of the model's release.
        thinking: every answer has its reasoning before it, that of earlier turns too, empty where a message
            has no `reasoning_content`; if not, no reasoning is rendered.
        effort: with thinking, as in `render`.

    Raises:
        ProblemsError: for an effort that the profile does not have.
    """
    if effort is not None and effort not in profile.effort_prefixes:
        known = ", ".join(profile.effort_prefixes)
        raise ProblemsError("no such profile of chats", [f"effort={effort!r} must be one of {known}"])

    def pieces(messages: Sequence[dict]) -> list[Piece]:
        read = messages_from_openai(messages)
        rendered: list[Piece] = []
        for end in range(1, len(read) + 1):
            is_answer = read[end - 1].role == "assistant"
            if end < len(read) and not is_answer and read[end].role != "assistant":
                continue  # its rendering may depend on the message after it
            now = render(read[:end], profile, thinking=thinking, effort=effort, drop_thinking=False)
            known = [(piece.text, piece.control) for piece in rendered]
            if list(map(tuple, now[: len(known)])) != known:
                raise ValueError(f"messages[{end - 1}] changes how those before it are rendered")
            rendered += [Piece(text, is_answer, is_control) for text, is_control in now[len(known) :]]
        return rendered

    def problems(messages: object) -> list[str]:
        try:
            read = messages_from_openai(messages)  # type: ignore[arg-type]
        except ProblemsError as refused:
            return list(refused.problems)
        roles = [message.role for message in read]
        found = []
        if roles[-1] != "assistant":
            found.append(f"messages[{len(roles) - 1}] is of {roles[-1]}; the last must be the assistant's")
        for index, role in enumerate(roles):
            if role == "assistant" and (index == 0 or roles[index - 1] not in ("user", "developer", "tool")):
                found.append(f"messages[{index}] answers no message of a user or tool")
            if role == "assistant" and not thinking and read[index].reasoning:
                found.append(f"messages[{index}] has reasoning, which is rendered with thinking=True only")
            if read[index].task is not None or read[index].unfinished:
                found.append(f"messages[{index}] has a task or no end, which is not for training")
        return found

    return ChatProfile(profile.name, pieces, control.CONTROL, problems)
