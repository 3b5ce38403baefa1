"""A conversation with a model in this process: words in, events of the answer out, history kept."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import render
from dsv4_jax.serving.chat.answer import Event, FinishReason, answer_of
from dsv4_jax.serving.chat.continuation import Continuation
from dsv4_jax.serving.chat.headings import prompt_pieces
from dsv4_jax.serving.chat.manner import Manner
from dsv4_jax.serving.chat.messages import Message, text_message
from dsv4_jax.serving.chat.profile import Profile
from dsv4_jax.serving.chat.tokens import AnswerTokens, ChatTokenizer, chat_tokenizer, prompt_ids

if TYPE_CHECKING:
    from dsv4_jax.language_model import LanguageModel

MAX_SEED = 2**63 - 1


class ChatSession:
    """A conversation.

    Args:
        model: with a tokenizer.
        profile: of the chat format.
        system: what the model is told before everything else; None: nothing.
        manner: how it answers; may be changed between answers.

    Attributes:
        messages: so far.

    Raises:
        ProblemsError: the model has no tokenizer.
    """

    def __init__(
        self,
        model: "LanguageModel",
        profile: Profile,
        system: str | None = None,
        manner: Manner | None = None,
    ) -> None:
        if model.tokenizer is None:
            raise ProblemsError("cannot chat", ["the checkpoint has no tokenizer.json"])
        self.profile = profile
        self.manner = Manner() if manner is None else manner
        self.tokenizer: ChatTokenizer = chat_tokenizer(
            model.tokenizer, model.config.bos_token_id, model.stop_token_ids
        )
        self._first = [] if system is None else [text_message("system", system)]
        self._continuation = Continuation(model)
        self._most_tokens = model.config.max_position_embeddings
        self._num_answers = 0
        self.messages: list[Message] = list(self._first)

    @property
    def num_reused(self) -> int:
        """Tokens of the last prompt that were not computed again."""
        return self._continuation.num_reused

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._first)

    def answer(self, words: str) -> Iterator[Event]:
        """Says `words` and yields the events of the answer; both become part of the history.

        A caller that stops early (and closes the iterator) leaves what was said until then. If nothing was,
        or the answer cannot be begun, the words are taken back.

        Raises:
            ProblemsError: the conversation is too long for the model, or its logits are no numbers.
        """
        manner = self.manner
        asked = [*self.messages, text_message("user", words)]
        how = {"thinking": manner.thinking, "effort": manner.effort}
        pieces = prompt_pieces(self.tokenizer, asked, self.profile, **how)
        ids = prompt_ids(self.tokenizer, pieces)
        left = self._most_tokens - len(ids)
        if left < 1:
            problem = f"the conversation makes {len(ids)} tokens; the model holds at most {self._most_tokens}"
            raise ProblemsError("cannot answer", [problem])
        parser = self.tokenizer.parser(reasoning=render.starts_reasoning(pieces))
        reader = AnswerTokens(self.tokenizer, parser)
        said: list[Event] = []
        reason: FinishReason = "abort"
        seed = (manner.seed + self._num_answers) % MAX_SEED
        sampling = {"temperature": manner.temperature, "top_p": manner.top_p, "seed": seed}
        try:
            for token in self._continuation.stream(ids, min(left, manner.max_new_tokens), **sampling):
                events = reader.add([token])
                said += events
                yield from events
                if parser.ended:
                    break
            reason = "length"
        except (ValueError, FloatingPointError) as refused:
            raise ProblemsError("cannot answer", [str(refused)]) from refused
        finally:
            if not parser.ended:
                rest = reader.finish(reason)
                said += rest
            else:
                rest = []
            self._keep(asked, said)
        yield from rest

    def _keep(self, asked: list[Message], said: list[Event]) -> None:
        answer = answer_of(said)
        if answer.reasoning or answer.content:
            self.messages = [*asked, answer.message()]
            self._num_answers += 1
