"""Bodies that nobody would write: whatever comes, the answer is no fault of the server."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.http import served
from tests.serving.http.served import until

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens")
FIELDS = (
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "min_p", "n", "seed", "stop", "stop_token_ids", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "stream", "stream_options", "logprobs",
    "top_logprobs", "echo",
    "best_of", "suffix", "tools", "tool_choice", "response_format", "reasoning_effort", "thinking",
    "chat_template_kwargs", "user", "cache_salt", "add_special_tokens", "system", "metadata",
    "stop_sequences", "output_config", "parallel_tool_calls",
)  # fmt: skip
WORDS = (
    "role", "content", "user", "assistant", "system", "tool", "type", "text", "function", "name",
    "parameters", "arguments", "tool_calls", "id", "tool_call_id", "auto", "none", "json_schema",
    "json_object", "schema", "object", "enabled", "disabled", "high", "include_usage", "tiny",
    "<｜User｜>", "</think>", "prefix", "$ref",
    "tool_use", "tool_result", "tool_use_id", "input", "input_schema", "thinking", "budget_tokens", "effort",
    "format", "any", "disable_parallel_tool_use",
)  # fmt: skip

texts = st.sampled_from(WORDS) | st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(
    st.dictionaries(st.sampled_from(WORDS), values, max_size=5)
    | st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(WORDS[2:6]), texts),
    max_size=4,
)
bodies = st.fixed_dictionaries(
    {"max_tokens": st.just(3) | values},
    optional={name: values for name in FIELDS if name not in ("messages", "prompt", "max_tokens")}
    | {"messages": messages, "prompt": texts | st.lists(st.integers(0, 319), max_size=4) | values},
)


@pytest.fixture(scope="module")
def fuzzed():
    running = served.Served(served.acted_model())
    yield running
    until(running.idle)
    running.close()


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), bodies)
def test_no_body_is_a_fault_of_the_server(fuzzed, path, body):
    response = fuzzed.post(path, json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass"))
    assert response.status_code in (200, 400, 404), response.text
    assert "Traceback" not in response.text


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(PATHS), st.binary(max_size=60) | bodies.map(lambda body: json.dumps(body).encode()[:-2])
)
def test_no_bytes_are_a_fault_of_the_server(fuzzed, path, data):
    assert fuzzed.post(path, data).status_code in (400, 404)
