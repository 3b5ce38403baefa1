"""Chats for fine-tuning: messages to token ids, with a mask of what the assistant said.

A profile turns messages into pieces of text and says of each whether the model is to learn it.
`QUICKSTART_CHAT` is our own, for models whose tokenizer has no role tags. A line of data is
{"messages": [{"role": ..., "content": ...}, ...]}.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dsv4_jax.reading.strict_json import shown
from dsv4_jax.training.documents import BadRecord, DataError, Document
from dsv4_jax.training.record_files import Records, half_a_pair
from dsv4_jax.training.tokenizer import BOS, EOS, TextEncoder

ROLES = ("system", "user", "assistant")


class Piece(NamedTuple):
    """A stretch of a rendered chat.

    Attributes:
        text: what it says; of a control piece the name of one special token.
        counted: whether its tokens are targets of the loss.
        control: whether it is a special token. What people wrote never is, whatever it spells.
    """

    text: str
    counted: bool = False
    control: bool = False


def message_problems(messages: object) -> list[str]:
    """What is wrong with the messages of one chat; nothing if they are a list of at least one question with
    its answer, behind at most one system message."""
    if not isinstance(messages, list) or not messages:
        return [f"messages={shown(messages)} must be a list of at least one message"]
    problems = []
    roles = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            problems.append(f"{name} is {type(message).__name__}, not an object")
            continue
        roles.append(message.get("role"))
        if roles[-1] not in ROLES:
            problems.append(f"{name} has the role {shown(roles[-1])}; it must be one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str):
            problems.append(f"{name} has the content {shown(content)}, which is no text")
        elif not content and roles[-1] != "system":
            problems.append(f"{name} has an empty content")
        if unknown := sorted(set(message) - {"role", "content"}):
            problems.append(f"{name} has {', '.join(map(shown, unknown))}, which would not be rendered")
    if problems:
        return problems
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        order = ", ".join(roles)
        return [f"the roles are {order}; user and assistant must alternate and end with the assistant"]
    return []


@dataclasses.dataclass(frozen=True)
class ChatProfile:
    """How messages look to a model.

    Attributes:
        name: of the profile.
        pieces: renders messages that `problems` finds nothing wrong with.
        control: names of all special tokens that pieces may hold.
        problems: what is wrong with the messages of a chat, which may be anything that JSON can say.
    """

    name: str
    pieces: Callable[[Sequence[dict]], Sequence[Piece]]
    control: tuple[str, ...] = (BOS, EOS)
    problems: Callable[[object], list[str]] = message_problems


def quickstart_pieces(messages: Sequence[dict]) -> list[Piece]:
    """Begin, then each message under a heading of its own; the assistant's end with the end token.

    The headings are ordinary text, so a user can write one: this profile is for models that one trains to
    look at, not for a service.
    """
    pieces = [Piece(BOS, control=True)]
    for message in messages:
        if message["role"] == "system":
            pieces.append(Piece(f"{message['content']}\n\n"))
        elif message["role"] == "user":
            pieces.append(Piece(f"### Question\n{message['content']}\n### Answer\n"))
        else:
            pieces += [Piece(message["content"], counted=True), Piece(EOS, counted=True, control=True)]
    return pieces


QUICKSTART_CHAT = ChatProfile("quickstart", quickstart_pieces)


class ChatEncoder:
    """Chats to token ids.

    Args:
        encoder: of texts and special tokens.
        profile: how messages are rendered.

    Raises:
        DataError: special tokens that the tokenizer lacks.
    """

    def __init__(self, encoder: TextEncoder, profile: ChatProfile) -> None:
        self._control = {name: encoder.control(name) for name in profile.control}
        missing = [name for name, token in self._control.items() if token is None]
        if missing:
            problems = [f"the tokenizer has no token {name!r}" for name in missing]
            raise DataError(f"chats cannot be encoded by the profile {profile.name!r}", problems)
        self._encoder, self._profile = encoder, profile

    @property
    def profile(self) -> ChatProfile:
        """Whose chats these are."""
        return self._profile

    def document(self, messages: Sequence[dict]) -> Document:
        """i32[n] ids and bool[n] counts. Neighbouring texts of the same kind are tokenised as one, so that
        the result does not depend on where a profile divides them."""
        ids: list[int] = []
        counts: list[bool] = []
        for piece in _joined(self._profile.pieces(messages)):
            found = [self._control[piece.text]] if piece.control else self._encoder.plain(piece.text)
            ids += found
            counts += [piece.counted] * len(found)
        return Document(np.asarray(ids, np.int32), np.asarray(counts, bool), whole=True)


class ChatDocuments:
    """Documents of records with messages."""

    def __init__(self, records: Records, encoder: ChatEncoder) -> None:
        self._records, self._encoder = records, encoder
        self.place = records.place

    def __len__(self) -> int:
        return len(self._records)

    def read(self, number: int, draw: np.random.Generator) -> Document | BadRecord:
        record = self._records.read(number)
        if isinstance(record, BadRecord):
            return record
        if "messages" not in record:
            names = ", ".join(map(shown, sorted(record)[:8])) or "none"
            return BadRecord(self.place(number), f"has no field 'messages' (its fields: {names})")
        if problems := self._encoder.profile.problems(record["messages"]):
            return BadRecord(self.place(number), "; ".join(problems))
        try:
            return self._encoder.document(record["messages"])
        except UnicodeEncodeError as error:
            return half_a_pair(self.place(number), error)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last[1:] == piece[1:] and not piece.control:
            joined[-1] = piece._replace(text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined
