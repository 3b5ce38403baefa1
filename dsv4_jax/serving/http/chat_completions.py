"""`POST /v1/chat/completions`: a conversation in OpenAI's form, answered whole or as a stream."""

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat.answer import (
    Answer,
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolArguments,
    ToolStart,
    answer_of,
)
from dsv4_jax.serving.chat.from_openai import conversation_from_openai
from dsv4_jax.serving.chat.messages import Conversation
from dsv4_jax.serving.chat.parser import MAX_CALLS
from dsv4_jax.serving.http import samplings
from dsv4_jax.serving.http.asked_grammar import grammar_of
from dsv4_jax.serving.http.choices import Choices
from dsv4_jax.serving.http.errors import invalid
from dsv4_jax.serving.http.responses import DONE, event
from dsv4_jax.serving.http.schemas import ChatFields, read_fields
from dsv4_jax.serving.http.service import Model, Service
from dsv4_jax.serving.http.turns import Prompt, Step, Turn, finish_of, prompt_of, steps
from dsv4_jax.serving.http.usage import usage
from dsv4_jax.serving.requests import Sampling, TokenLogprob


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        fields: as sent. prompt: of the conversation. sampling: of the first choice.
        warnings: what was accepted although it has no effect.
    """

    fields: ChatFields
    prompt: Prompt
    sampling: Sampling
    warnings: tuple[str, ...]

    @property
    def max_calls(self) -> int:
        """Calls of tools that each answer may have."""
        return 1 if self.fields.parallel_tool_calls is False else MAX_CALLS

    @property
    def num_choices(self) -> int:
        """Answers that are asked for."""
        return self.fields.n or 1

    def asked(self) -> list[tuple[Sequence[int], Sampling]]:
        """What each choice asks of the engine."""
        seed = self.sampling.seed
        return [
            (self.prompt.ids, dataclasses.replace(self.sampling, seed=samplings.seed_of_choice(seed, index)))
            for index in range(self.num_choices)
        ]


def read_chat(service: Service, model: Model, body: Mapping[str, Any]) -> ChatRequest:
    """Checks a request and encodes its prompt. It takes time for a long one: call it in a thread.

    Raises:
        HttpProblem, ProblemsError: with every problem.
    """
    fields, problems = read_fields(ChatFields, body)
    conversation: Conversation | None = None
    try:
        conversation = conversation_from_openai(body, model.profile)
    except ProblemsError as refused:
        problems += refused.problems
    if fields is not None and conversation is not None:
        problems += _contradictions(service, fields, conversation)
    if problems or fields is None or conversation is None:
        raise invalid(problems)
    service.check_name(fields.model)
    prompt = prompt_of(model, conversation)
    asked = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    room = samplings.room_for(model, service.limits, len(prompt.ids), asked, None)
    wanted = (fields.top_logprobs or 0) if fields.logprobs else None
    samplings.check_logprobs(service.limits, room * (fields.n or 1), wanted)
    sampling = samplings.sampling_of(fields, max_tokens=room, logprobs=wanted)
    most_calls = 1 if fields.parallel_tool_calls is False else None
    grammar = grammar_of(model, conversation, prompt.reasons, most_calls=most_calls)
    if grammar is not None:
        sampling = dataclasses.replace(sampling, grammar=grammar)
    samplings.check_served(model, prompt.ids, sampling)
    return ChatRequest(fields, prompt, sampling, conversation.warnings)


def _contradictions(service: Service, fields: ChatFields, conversation: Conversation) -> list[str]:
    found = []
    both = (fields.max_tokens, fields.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        found.append("max_completion_tokens: contradicts max_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        found.append("top_logprobs: needs logprobs: true")
    if fields.stream_options is not None and not fields.stream:
        found.append("stream_options: needs stream: true")
    if service.insist_on_reasoning and conversation.thinking:
        found += [
            f"messages[{index}].reasoning_content: is missing from a turn that calls tools"
            for index, message in enumerate(conversation.messages)
            if message.tool_calls and not message.reasoning
        ]
    return found


class ChatAnswer:
    """The response to a checked request.

    Args:
        service, model: of the server. request: checked. salt: of the prefix cache. cut: ends the connection.
    """

    def __init__(
        self,
        service: Service,
        model: Model,
        request: ChatRequest,
        salt: bytes,
        cut: Callable[[], None] | None = None,
    ) -> None:
        self._service, self._model, self._request = service, model, request
        self._choices = Choices(service, model, request.asked(), salt, cut)
        fields = request.fields
        self._turns = [
            Turn(model, request.prompt, fields.stop, bool(fields.ignore_eos), request.max_calls)
            for _ in range(request.num_choices)
        ]
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": model.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """The JSON object of the whole answer."""
        events: list[list[Event]] = [[] for _ in self._turns]
        logprobs: list[list[tuple[bool, TokenLogprob]]] = [[] for _ in self._turns]
        async with self._choices as choices:
            async for step in steps(choices, self._turns, self._service.metrics):
                events[step.index] += step.events
                logprobs[step.index] += step.logprobs
        answers = [answer_of(each) for each in events]
        found = [
            {
                "index": index,
                "message": _message(answer),
                "logprobs": self._logprobs(logprobs[index]),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head, "object": "chat.completion", "choices": found, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Encoded events."""
        options = self._request.fields.stream_options
        with_usage = options is not None and bool(options.include_usage)
        silent: set[int] = set(range(len(self._turns)))
        held: list[list[tuple[bool, TokenLogprob]]] = [[] for _ in self._turns]
        async with self._choices as choices:
            async for step in steps(choices, self._turns, self._service.metrics):
                held[step.index] += step.logprobs
                if step.index in silent:
                    silent.discard(step.index)
                    yield self._chunk(step.index, {"role": "assistant", "content": ""}, with_usage)
                for delta in _deltas(step):
                    yield self._chunk(step.index, delta, with_usage, logprobs=held[step.index])
                    held[step.index] = []
                if (reason := finish_of(step.events)) is not None:
                    rest = held[step.index]
                    yield self._chunk(step.index, {}, with_usage, logprobs=rest, reason=reason)
        if with_usage:
            head = {**self._head, "object": "chat.completion.chunk"}
            yield event({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        with_usage: bool,
        logprobs: Sequence[tuple[bool, TokenLogprob]] = (),
        reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return event(chunk | {"usage": None} if with_usage else chunk)

    def _logprobs(self, found: Sequence[tuple[bool, TokenLogprob]]) -> dict[str, Any] | None:
        if not self._request.fields.logprobs:
            return None
        assert self._model.texts is not None
        lists: dict[str, Any] = {"content": [], "reasoning_content": [], "refusal": None}
        for is_reasoning, logprob in found:
            lists["reasoning_content" if is_reasoning else "content"].append(
                self._model.texts.chat_entry(logprob)
            )
        return lists

    def _usage(self) -> dict[str, Any]:
        choices = self._choices
        reasoning = sum(turn.tokens.num_reasoning for turn in self._turns)
        num_prompt = len(self._request.prompt.ids)
        count = sum(turn.count for turn in self._turns)
        return usage(num_prompt, count, min(max(choices.cached), num_prompt), reasoning)


def _message(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning is not None:
        found["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ]
    elif answer.content is None and answer.reasoning is None:
        found["content"] = ""
    return found


def _deltas(step: Step) -> list[dict[str, Any]]:
    """The deltas of a step; texts of one kind that follow each other are one."""
    found: list[dict[str, Any]] = []

    def text(key: str, piece: str) -> None:
        if found and found[-1].keys() == {key}:
            found[-1][key] += piece
        else:
            found.append({key: piece})

    for each in step.events:
        match each:
            case ReasoningDelta(piece):
                text("reasoning_content", piece)
            case ContentDelta(piece):
                text("content", piece)
            case ToolStart(index, id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
                found.append({"tool_calls": [call]})
            case ToolArguments(index, piece):
                found.append({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    return found
