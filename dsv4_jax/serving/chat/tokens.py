"""Between the pieces of a prompt and token ids, and between generated ids and the parser.

A control piece is one token; ordinary text is encoded by a tokenizer that has no added tokens, so that a text
which spells out a control token becomes ordinary tokens.
"""

import copy
import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference.text import TextStream
from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.answer import Event, FinishReason
from dsv4_jax.serving.chat.parser import AnswerParser
from dsv4_jax.serving.chat.render import Piece, text_of
from dsv4_jax.serving.chat.tags import TOKEN_OF


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    """One tokenizer.json in two forms.

    Attributes:
        full: as it is; it decodes, and encodes text in which control tokens are meant.
        literal: the same without added tokens.
        control_ids: control string -> its token. Strings without one are written as ordinary text.
        eos_ids: tokens that end a turn.
    """

    full: Tokenizer
    literal: Tokenizer
    control_ids: Mapping[str, int]
    eos_ids: Collection[int]

    @property
    def missing(self) -> tuple[str, ...]:
        """Control strings that are no tokens: with a user's text they could be forged."""
        return tuple(each for each in control.CONTROL if each not in self.control_ids)

    @property
    def knows_thinking(self) -> bool:
        """Whether the marks of reasoning are tokens, so that the same words in a text are only words."""
        return {control.THINK, control.END_THINK} <= self.control_ids.keys()

    @property
    def knows_calls(self) -> bool:
        """Whether the marker in the tags of calls is a token, so that tags spelt in a text are only words."""
        return control.DSML in self.control_ids

    def parser(self, **how: Any) -> AnswerParser:
        """A parser of answers in these tokens; arguments as of `AnswerParser`, without those on ids."""
        return AnswerParser(by_ids=self.knows_thinking, calls_by_ids=self.knows_calls, **how)


def chat_tokenizer(
    tokenizer: Tokenizer, bos_token_id: int | None, eos_token_ids: Sequence[int]
) -> ChatTokenizer:
    """The two forms of a model's tokenizer.

    Args:
        tokenizer: of tokenizer.json; it is not changed.
        bos_token_id: of the config, for a tokenizer without V4's BOS.
        eos_token_ids: that end a turn (`LanguageModel.stop_token_ids`).
    """
    full = copy.deepcopy(tokenizer)  # truncation and padding belong to training batches
    full.no_truncation()
    full.no_padding()
    plain = json.loads(full.to_str()) | {"added_tokens": []}
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    ids = {each: added[each] for each in control.CONTROL if each in added}
    if control.BOS not in ids and bos_token_id is not None:
        ids[control.BOS] = bos_token_id
    if control.EOS not in ids and eos_token_ids:
        ids[control.EOS] = eos_token_ids[0]
    eos_ids = frozenset(eos_token_ids) | ({ids[control.EOS]} if control.EOS in ids else set())
    return ChatTokenizer(full, Tokenizer.from_str(json.dumps(plain)), ids, eos_ids)


def prompt_ids(
    tokenizer: ChatTokenizer, pieces: Iterable[Piece], *, allow_control_in_text: bool = False
) -> list[int]:
    """The ids of a rendered prompt.

    Args:
        allow_control_in_text: encode the whole prompt as one text, as the reference does: whoever writes a
            control string into a message then writes a control token.

    Raises:
        ProblemsError: a text holds half of a surrogate pair, which is no character.
    """
    pieces = list(pieces)
    try:
        text_of(pieces).encode()
    except UnicodeEncodeError:
        problem = "a message holds half of a surrogate pair, which is no character"
        raise ProblemsError("the conversation cannot be encoded", [problem]) from None
    if allow_control_in_text:
        return tokenizer.full.encode(text_of(pieces), add_special_tokens=False).ids
    ids: list[int] = []
    run: list[str] = []
    for text, is_control in pieces:
        if is_control and text in tokenizer.control_ids:
            ids += _literal(tokenizer, run)
            ids.append(tokenizer.control_ids[text])
            run = []
        else:
            run.append(text)
    return ids + _literal(tokenizer, run)


def _literal(tokenizer: ChatTokenizer, run: Sequence[str]) -> list[int]:
    text = "".join(run)
    return tokenizer.literal.encode(text, add_special_tokens=False).ids if text else []


class AnswerTokens:
    """Feeds a parser with generated ids.

    Args:
        tokenizer: of the model.
        parser: of that tokenizer (`ChatTokenizer.parser`).

    Attributes:
        num_reasoning: ids so far that belong to the reasoning.
    """

    def __init__(self, tokenizer: ChatTokenizer, parser: AnswerParser) -> None:
        self.num_reasoning = 0
        self._parser = parser
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer.full)
        self._added = {
            id: token.content for id, token in tokenizer.full.get_added_tokens_decoder().items()
        } | {id: text for text, id in tokenizer.control_ids.items()}

    def add(self, ids: Iterable[int]) -> list[Event]:
        """What these ids settle. Ids after the end of the turn are ignored."""
        events: list[Event] = []
        for id in ids:
            if self._parser.ended:
                break
            self.num_reasoning += self._parser.in_reasoning
            events += self._add(int(id))
        return events

    def finish(self, reason: FinishReason = "stop") -> list[Event]:
        """As `AnswerParser.finish`, with the rest of a character that never became whole."""
        return self._parser.feed(self._text.finish()) + self._parser.finish(reason)

    def _add(self, id: int) -> list[Event]:
        parser, text = self._parser, self._added.get(id)
        if id in self._tokenizer.eos_ids:
            return self.finish("stop")
        if text is None:
            return parser.feed(self._text.add(id))
        before = self._text.finish()
        if text in parser.marks:
            return parser.feed(before + TOKEN_OF[text])
        if text in (control.DSML, control.THINK, control.END_THINK):
            return parser.feed(before + text)
        if text in control.ENDS_OF_TURN:
            parser.recoveries["role_token"] += 1
            return parser.feed(before) + parser.finish("stop")
        parser.recoveries["hidden_token"] += 1
        return parser.feed(before)
