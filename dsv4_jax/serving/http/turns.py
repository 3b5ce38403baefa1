"""Answers of a conversation: from the engine's outputs to the parser's events, for OpenAI's and Anthropic's
forms alike."""

import dataclasses
from collections.abc import AsyncIterator, Sequence

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import render
from dsv4_jax.serving.chat.answer import Event, Finish
from dsv4_jax.serving.chat.headings import prompt_pieces
from dsv4_jax.serving.chat.messages import Conversation, Tool
from dsv4_jax.serving.chat.parser import MAX_CALLS
from dsv4_jax.serving.chat.tokens import AnswerTokens, prompt_ids
from dsv4_jax.serving.http.choices import Choices
from dsv4_jax.serving.http.metrics import Metrics
from dsv4_jax.serving.http.service import Model
from dsv4_jax.serving.requests import Output, TokenLogprob


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation as the model gets it.

    Attributes:
        ids: of the prompt. reasons: the answer begins inside its reasoning.
        tools: that it may call.
    """

    ids: tuple[int, ...]
    reasons: bool
    tools: tuple[Tool, ...]


def prompt_of(model: Model, conversation: Conversation) -> Prompt:
    """Renders and encodes a conversation.

    Raises:
        ProblemsError: for what cannot be rendered, or a model without tokenizer.
    """
    if model.chat is None:
        raise ProblemsError("no conversation", ["a conversation needs a tokenizer.json, which is not there"])
    how = {"thinking": conversation.thinking, "effort": conversation.effort}
    pieces = prompt_pieces(model.chat, conversation.messages, model.profile, **how)
    ids = tuple(prompt_ids(model.chat, pieces))
    return Prompt(ids, render.starts_reasoning(pieces), conversation.tools)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one output adds to one answer: events, and for each token whether it is reasoning, with its
    log-probability."""

    index: int
    events: Sequence[Event]
    logprobs: Sequence[tuple[bool, TokenLogprob]]


class Turn:
    """One answer in the making.

    Args:
        model: of the server. prompt: of the conversation. stops: texts that end the answer.
        ignore_eos: the model's end of a turn does not end it.
        max_calls: calls of tools that are given out; further ones are dropped.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        stops: Sequence[str],
        ignore_eos: bool,
        max_calls: int = MAX_CALLS,
    ) -> None:
        assert model.chat is not None
        self.parser = model.chat.parser(
            reasoning=prompt.reasons, tools=prompt.tools, stops=stops, max_calls=max_calls
        )
        self.tokens = AnswerTokens(model.chat, self.parser)
        self.count = 0  # tokens of the answer; the engine may have drawn more before it was told to stop
        self._skipped = frozenset(model.chat.eos_ids) if ignore_eos else frozenset()

    def add(self, index: int, output: Output) -> Step:
        """Takes an output of the engine."""
        events: list[Event] = []
        logprobs: list[tuple[bool, TokenLogprob]] = []
        found = output.logprobs or (None,) * len(output.token_ids)
        reason = output.finish_reason
        last = len(output.token_ids) - 1
        for number, (token, logprob) in enumerate(zip(output.token_ids, found, strict=True)):
            if self.parser.ended:
                break
            self.count += 1
            if logprob is not None:
                logprobs.append((self.parser.in_reasoning, logprob))
            if reason == "stop" and number == last:
                events += self.tokens.finish("stop")
            elif token not in self._skipped:
                events += self.tokens.add([token])
        if reason is not None and not self.parser.ended:
            events += self.tokens.finish("stop" if reason == "stop" else "length")
        return Step(index, events, logprobs)


async def steps(choices: Choices, turns: Sequence[Turn], metrics: Metrics) -> AsyncIterator[Step]:
    """Everything that the answers add, until all are complete. Errors as of `Choices.more`."""
    while outputs := await choices.more():
        for index, output in outputs:
            turn = turns[index]
            if turn.parser.ended:
                continue
            step = turn.add(index, output)
            if turn.parser.ended:
                choices.stop(index)
                for kind, count in turn.parser.recoveries.items():
                    metrics.recoveries.labels(kind).inc(count)
                metrics.leak_guard.inc(turn.parser.recoveries["marker_in_words"])
            yield step


def finish_of(events: Sequence[Event]) -> str | None:
    """Why a turn ended, if it did with these events."""
    return next((each.reason for each in events if isinstance(each, Finish)), None)
