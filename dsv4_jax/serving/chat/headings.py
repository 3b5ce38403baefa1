"""Conversations for a tokenizer without role tokens, such as the quickstart's: turns under headings.

The headings are those that fine-tuning writes for such a tokenizer (`training.chat_records.QUICKSTART_CHAT`).
They are ordinary text, so words of users can imitate them: this is for models that one trains to look at.
"""

from collections.abc import Sequence

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import control, render
from dsv4_jax.serving.chat.messages import Message, Text
from dsv4_jax.serving.chat.profile import OWN, Profile
from dsv4_jax.serving.chat.render import Piece
from dsv4_jax.serving.chat.tokens import ChatTokenizer

QUESTION, ANSWER = "### Question\n", "\n### Answer\n"


def uses_headings(tokenizer: ChatTokenizer, profile: Profile) -> bool:
    """Whether conversations are written under headings: our own profile, and no tokens for roles."""
    return profile is OWN and not {control.USER, control.ASSISTANT} <= tokenizer.control_ids.keys()


def prompt_pieces(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    profile: Profile,
    *,
    thinking: bool = True,
    effort: str | None = None,
) -> tuple[Piece, ...]:
    """The prompt of a conversation in the form that fits the tokenizer; arguments and errors as of
    `render.render`, and a ProblemsError for what has no form under headings."""
    if uses_headings(tokenizer, profile):
        return under_headings(messages)
    return render.render(messages, profile, thinking=thinking, effort=effort)


def under_headings(messages: Sequence[Message]) -> tuple[Piece, ...]:
    """Begin, the system's words, then questions and answers; an answer ends with the end token.

    Reasoning is left out.

    Raises:
        ProblemsError: for tools, schemas and tasks, which need the tokens of V4's format.
    """
    problems = [
        f"messages[{index}]: tools, schemas and tasks need a tokenizer with the tokens of V4's chat format"
        for index, message in enumerate(messages)
        if message.tools
        or message.tool_calls
        or message.task
        or message.response_schema is not None
        or message.role not in ("system", "developer", "user", "assistant")
        or not all(isinstance(part, Text) for part in message.parts)
    ]
    if problems:
        raise ProblemsError("the conversation cannot be rendered", problems)
    pieces = [Piece(control.BOS, True)]
    for message in messages:
        words = "\n\n".join(part.text for part in message.parts)
        if message.role == "user":
            pieces.append(Piece(f"{QUESTION}{words}{ANSWER}", False))
        elif message.role == "assistant":
            pieces += [Piece(words, False)] * bool(words)
            pieces += [Piece(control.EOS, True)] * (not message.unfinished)
        else:
            pieces.append(Piece(f"{words}\n\n", False))
    return tuple(pieces)
