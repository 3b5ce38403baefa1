"""The fields of OpenAI's and Anthropic's requests, checked strictly: "3" is no number, `true` is no 1.

Fields that are not here are ignored, as clients send many. Messages and tools are read by `serving.chat`.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from dsv4_jax.serving.chat.wire import kind
from dsv4_jax.serving.http.limits import MAX_STRING_CHARS
from dsv4_jax.serving.requests import (
    MOST_BIASES,
    MOST_LOGPROBS,
    MOST_STOP_LENGTH,
    MOST_STOP_TOKENS,
    MOST_STOPS,
)

MOST_CHOICES = 16
MOST_PROMPTS = 2048
MOST_TOKENS = 1 << 24
"""No model here has a context of so many tokens; the real limit depends on the prompt."""


def _stops(value: object) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string or an array of strings")
    if len(texts) > MOST_STOPS:
        raise ValueError(f"has {len(texts)} strings; at most {MOST_STOPS} are accepted")
    if not all(1 <= len(text) <= MOST_STOP_LENGTH for text in texts):
        raise ValueError(f"every string must have 1 to {MOST_STOP_LENGTH} characters")
    return tuple(texts)


def _biases(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"must be an object, not {kind(value)}")
    if len(value) > MOST_BIASES:
        raise ValueError(f"has {len(value)} entries; at most {MOST_BIASES} are accepted")
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError("every key must be a token id in quotes")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("every value must be a number in -100..100")
        found[int(key)] = float(bias)
    return found


def _nothing(value: object) -> str | None:
    if value not in (None, ""):
        raise ValueError("is not offered")
    return None


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in value)


def _prompts(value: object) -> list[str | list[int]]:
    if isinstance(value, str) or (value and _is_ids(value)):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, str) or _is_ids(each) for each in value):
        raise ValueError("must be a string, an array of token ids, or an array of such")
    if not 1 <= len(value) <= MOST_PROMPTS:
        raise ValueError(f"has {len(value)} prompts; 1 to {MOST_PROMPTS} are accepted")
    if not all(value):
        raise ValueError("an empty prompt gives nothing to continue")
    return value


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(_Fields):
    """Of a stream."""

    include_usage: bool | None = None


class Sampled(_Fields):
    """What all requests say about how tokens are drawn."""

    model: Annotated[str, Field(max_length=MAX_STRING_CHARS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[Any, PlainValidator(_stops)] = ()
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOP_TOKENS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[Any, PlainValidator(_biases)] = Field(default_factory=dict)
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_STRING_CHARS)] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_STRING_CHARS)] | None = None


class ChatFields(Sampled):
    """Of `POST /v1/chat/completions`, without messages and tools."""

    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None


class Thinking(_Fields):
    """Of a message: how long the model may think, which it decides itself."""

    budget_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None


class ToolChoice(_Fields):
    """Of a message: of `tool_choice` what is not read with the conversation."""

    disable_parallel_tool_use: bool | None = None


class CountFields(_Fields):
    """Of `POST /v1/messages/count_tokens`, without what belongs to the conversation."""

    model: Annotated[str, Field(max_length=MAX_STRING_CHARS)] | None = None


class MessageFields(Sampled):
    """Of `POST /v1/messages`, without messages and tools."""

    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    stop_sequences: Annotated[Any, PlainValidator(_stops)] = ()
    thinking: Thinking | None = None
    tool_choice: ToolChoice | None = None


class CompletionFields(Sampled):
    """Of `POST /v1/completions`."""

    prompt: Annotated[Any, PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: Annotated[Any, PlainValidator(_nothing)] = None
    add_special_tokens: bool | None = None


Fields = TypeVar("Fields", bound=_Fields)


def read_fields(schema: type[Fields], body: Mapping[str, Any]) -> tuple[Fields | None, list[str]]:
    """(the fields of a request, or None with all problems as `path: rule`)."""
    try:
        return schema.model_validate(dict(body)), []
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        return None, [f"{_path(each['loc'])}: {_rule(each['msg'])}" for each in found]


def _path(location: tuple[int | str, ...]) -> str:
    path = str(location[0])
    for step in location[1:]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path if len(path) <= MAX_STRING_CHARS else json.dumps(path[:MAX_STRING_CHARS])


def _rule(message: str) -> str:
    if message.startswith("Input should be a valid dictionary"):  # which names a class of ours
        return "must be an object"
    rule = message.removeprefix("Value error, ").replace("Input should", "should")
    return rule[:1].lower() + rule[1:]
