"""`POST /v1/messages` and `count_tokens`: a conversation in Anthropic's form, answered whole or streamed."""

import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat.answer import Event, answer_of
from dsv4_jax.serving.chat.from_anthropic import conversation_from_anthropic
from dsv4_jax.serving.chat.messages import Conversation
from dsv4_jax.serving.chat.parser import MAX_CALLS
from dsv4_jax.serving.chat.to_anthropic import BlockStream, blocks_of, stop_reason
from dsv4_jax.serving.http import samplings
from dsv4_jax.serving.http.asked_grammar import ANTHROPIC, grammar_of
from dsv4_jax.serving.http.choices import Choices
from dsv4_jax.serving.http.errors import invalid
from dsv4_jax.serving.http.responses import event
from dsv4_jax.serving.http.schemas import CountFields, Fields, MessageFields, read_fields
from dsv4_jax.serving.http.service import Model, Service
from dsv4_jax.serving.http.turns import Prompt, Turn, finish_of, prompt_of, steps
from dsv4_jax.serving.http.usage import message_usage
from dsv4_jax.serving.requests import Sampling


@dataclasses.dataclass(frozen=True)
class MessageRequest:
    """A checked request.

    Attributes:
        fields: as sent. prompt: of the conversation. sampling: of the answer.
        warnings: what was accepted although it has no effect.
    """

    fields: MessageFields
    prompt: Prompt
    sampling: Sampling
    warnings: tuple[str, ...]

    @property
    def max_calls(self) -> int:
        """Calls of tools that the answer may have."""
        return 1 if _calls_once(self.fields) else MAX_CALLS


def read_message(service: Service, model: Model, body: Mapping[str, Any]) -> MessageRequest:
    """Checks a request and encodes its prompt. It takes time for a long one: call it in a thread.

    Raises:
        HttpProblem, ProblemsError: with every problem.
    """
    fields, conversation = _read(MessageFields, service, model, body)
    prompt = prompt_of(model, conversation)
    room = samplings.room_for(model, service.limits, len(prompt.ids), fields.max_tokens, None)
    sampling = samplings.sampling_of(fields, max_tokens=room)
    most_calls = 1 if _calls_once(fields) else None
    if (grammar := grammar_of(model, conversation, prompt.reasons, ANTHROPIC, most_calls)) is not None:
        sampling = dataclasses.replace(sampling, grammar=grammar)
    samplings.check_served(model, prompt.ids, sampling)
    warnings = conversation.warnings
    if fields.thinking is not None and fields.thinking.budget_tokens is not None:
        warnings += ("thinking.budget_tokens: ignored; the model decides how long it thinks",)
    return MessageRequest(fields, prompt, sampling, warnings)


def _calls_once(fields: MessageFields) -> bool:
    return fields.tool_choice is not None and bool(fields.tool_choice.disable_parallel_tool_use)


def count_tokens(service: Service, model: Model, body: Mapping[str, Any]) -> dict[str, int]:
    """The answer of `count_tokens`: how long the prompt of a message would be. Raises as `read_message`."""
    _, conversation = _read(CountFields, service, model, body)
    return {"input_tokens": len(prompt_of(model, conversation).ids)}


def _read(
    schema: type[Fields], service: Service, model: Model, body: Mapping[str, Any]
) -> tuple[Fields, Conversation]:
    fields, problems = read_fields(schema, body)
    conversation: Conversation | None = None
    try:
        conversation = conversation_from_anthropic(body, model.profile)
    except ProblemsError as refused:
        # Both readers look at some objects, and say the same of one that is none.
        problems += [each for each in refused.problems if not _is_said(each, problems)]
    if isinstance(fields, MessageFields):
        problems += _contradictions(fields)
    if conversation is not None:
        problems += _missing_thinking(service, conversation)
    if problems or fields is None or conversation is None:
        raise invalid(problems)
    service.check_name(fields.model)  # type: ignore[attr-defined]
    return fields, conversation


def _is_said(problem: str, problems: Sequence[str]) -> bool:
    field = problem.partition(": ")[0]
    return any(each.partition(": ")[0] == field for each in problems)


def _contradictions(fields: MessageFields) -> list[str]:
    found = []
    if fields.n not in (None, 1):
        found.append("n: a message is one answer")
    if fields.stop:
        found.append("stop: is called stop_sequences here")
    if fields.stream_options is not None:
        found.append("stream_options: the stream of a message always tells its usage")
    return found


def _missing_thinking(service: Service, conversation: Conversation) -> list[str]:
    if not (service.insist_on_reasoning and conversation.thinking):
        return []
    silent = any(each.tool_calls and not each.reasoning for each in conversation.messages)
    return ["messages: the thinking of a turn that calls tools is missing"] if silent else []


class MessageAnswer:
    """The response to a checked request; arguments as of `ChatAnswer`."""

    def __init__(
        self,
        service: Service,
        model: Model,
        request: MessageRequest,
        salt: bytes,
        cut: Callable[[], None] | None = None,
    ) -> None:
        self._service, self._request = service, request
        self._choices = Choices(service, model, [(request.prompt.ids, request.sampling)], salt, cut)
        fields = request.fields
        stops, ignore_eos = fields.stop_sequences, bool(fields.ignore_eos)
        self._turn = Turn(model, request.prompt, stops, ignore_eos, request.max_calls)
        self._head = {
            "id": f"msg_{secrets.token_hex(16)}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The JSON object of the whole answer."""
        events: list[Event] = []
        async with self._choices as choices:
            async for step in steps(choices, [self._turn], self._service.metrics):
                events += step.events
        answer = answer_of(events)
        assert answer.finish_reason is not None
        blocks = blocks_of(answer)
        return {**self._head, "content": blocks, **self._end(answer.finish_reason), "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Encoded events: `message_start`, those of every block, `message_delta`, `message_stop`."""
        blocks, begun = BlockStream(), False
        async with self._choices as choices:
            async for step in steps(choices, [self._turn], self._service.metrics):
                if not begun:
                    begun = True
                    yield _named({"type": "message_start", "message": self._beginning()})
                for each in step.events:
                    for found in blocks.add(each):
                        yield _named(found)
                if (reason := finish_of(step.events)) is not None:
                    end = {"type": "message_delta", "delta": self._end(reason), "usage": self._usage()}
                    yield _named(end)
        yield _named({"type": "message_stop"})

    def _beginning(self) -> dict[str, Any]:
        nothing = {"content": [], "stop_reason": None, "stop_sequence": None}
        return {**self._head, **nothing, "usage": self._usage()}

    def _end(self, reason: str) -> dict[str, Any]:
        stop = self._turn.parser.stop
        return {"stop_reason": stop_reason(reason, stop), "stop_sequence": stop}

    def _usage(self) -> dict[str, int]:
        num_prompt = len(self._request.prompt.ids)
        return message_usage(num_prompt, self._turn.count, min(self._choices.cached[0], num_prompt))


def _named(value: dict[str, Any]) -> bytes:
    return event(value, value["type"])
