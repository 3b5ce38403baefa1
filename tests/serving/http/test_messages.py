"""Anthropic's messages: the real client, the order of the stream's events, tools, thinking, and errors."""

import json

import anthropic
import pytest

from dsv4_jax.serving.requests import Output
from tests.serving.chat.turns import PARIS, block, invoke, parameter
from tests.serving.http.served import KEY, NAME

USER = [{"role": "user", "content": "hello wörld"}]
TOOLS = [
    {
        "name": "get_weather",
        "description": "of a town",
        "input_schema": {"type": "object", "properties": {"location": {"type": "string"}}},
    }
]
FIELDS = {"model": NAME, "messages": USER, "max_tokens": 64}
PATH = "/v1/messages"


def client_of(server, key="unused", **more):
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, **more)


def events_of(text):
    """The JSON values of a stream, each of which must have its own type as its name."""
    found = []
    for each in text.split("\n\n")[:-1]:
        if each.startswith(":"):
            continue
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def error_of(response, status, kind):
    assert response.status_code == status, response.text
    body = response.json()
    assert body["type"] == "error" and body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return body["error"]["message"]


def test_the_order_of_events(acted):
    acted.engine.say("why</think>so\n\n" + block(PARIS, invoke("get_weather", parameter("location", "Rom"))))
    body = FIELDS | {"stream": True, "tools": TOOLS, "max_tokens": 2000, "thinking": {"type": "adaptive"}}
    response = acted.post(PATH, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    shortened = [events[0]["type"]]
    for each in events[1:]:
        if each["type"] != shortened[-1]:
            shortened.append(each["type"])
    one = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert shortened == ["message_start", *one * 4, "message_delta", "message_stop"]
    starts = [each for each in events if each["type"] == "content_block_start"]
    kinds = [each["content_block"]["type"] for each in starts]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    assert [each["index"] for each in starts] == [0, 1, 2, 3]
    beginning, end = events[0]["message"], events[-2]
    assert beginning["content"] == [] and beginning["stop_reason"] is None
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["output_tokens"] > 20 and "[DONE]" not in response.text


def test_a_loop_of_tools_with_the_client(acted):
    acted.engine.say("let me look</think>\n\n" + block(PARIS))
    asked = FIELDS | {"max_tokens": 2000, "tools": TOOLS, "thinking": {"type": "enabled", "budget_tokens": 9}}
    with client_of(acted) as client:
        with client.messages.stream(**asked) as stream:
            answer = stream.get_final_message()
        thinking, call = answer.content
        assert thinking.thinking == "let me look" and answer.stop_reason == "tool_use"
        assert (call.name, call.input) == ("get_weather", {"location": "Paris"})
        acted.engine.say("sunny</think>Sunny!")
        said = [{"type": "text", "text": "18 °C"}]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": said}
        turns = [("assistant", answer.content), ("user", [result])]
        history = [*USER, *({"role": role, "content": content} for role, content in turns)]
        final = client.messages.create(**asked | {"messages": history})
    assert [each.type for each in final.content] == ["thinking", "text"] and final.stop_reason == "end_turn"
    prompt = acted.engine.lm.tokenizer.decode(acted.engine.asked[-1][0], skip_special_tokens=False)
    assert "<think>let me look</think>" in prompt and "<tool_result>18 °C</tool_result>" in prompt
    assert prompt.index("get_weather") < prompt.index("hello wörld") < prompt.index("18 °C")


def test_one_call_at_a_time(acted):
    acted.engine.say(block(PARIS, PARIS))
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    for asked, count in (({}, 2), ({"tool_choice": choice}, 1)):
        content = acted.post(PATH, FIELDS | {"tools": TOOLS, "max_tokens": 2000} | asked).json()["content"]
        assert [each["type"] for each in content] == ["tool_use"] * count


def test_why_an_answer_ends(acted):
    with client_of(acted) as client:
        acted.engine.say("one two three")
        assert client.messages.create(**FIELDS).stop_reason == "end_turn"
        stopped = client.messages.create(**FIELDS, stop_sequences=["never", " three"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " three")
        assert stopped.content[0].text == "one two"
        with client.messages.stream(**FIELDS, stop_sequences=["two"]) as stream:
            assert "".join(stream.text_stream) == "one "
            assert stream.get_final_message().stop_sequence == "two"
        assert client.messages.create(**FIELDS | {"max_tokens": 2}).stop_reason == "max_tokens"


def test_systems_and_beginnings(acted):
    first = {"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}
    system = [first, {"type": "text", "text": "kind"}]
    messages = [*USER, {"role": "assistant", "content": "Well,"}]
    with client_of(acted) as client:
        client.messages.create(**FIELDS | {"messages": messages}, system=system, metadata={"user_id": "u"})
    prompt = acted.engine.lm.tokenizer.decode(acted.engine.asked[-1][0], skip_special_tokens=False)
    assert "be\n\nkind" in prompt and prompt.endswith("Well,")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"temperature": float("nan")}, "finite"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"n": 2}, "n: "),
        ({"stop": "a"}, "stop_sequences"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"thinking": 3}, "thinking"),
        ({"thinking": {"type": "some"}}, "thinking.type"),
        ({"output_config": {"effort": "vast"}}, "effort"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
        ({"system": 3}, "system"),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "tool_choice: needs a tokenizer.json"),
        ({"tool_choice": {"type": "any"}}, "any needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"tools": [{"name": "a b"}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "disable_"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "content[0].type"),
    ],
)
def test_refusals_are_in_anthropics_form(acted, changed, named):
    body = {name: value for name, value in (FIELDS | changed).items() if value is not None}
    message = error_of(acted.post(PATH, body), 400, "invalid_request_error")
    assert named in message
    told = [rule.partition(": ")[0] for rule in message.split("; ")]
    assert len(told) == len(set(told)), "nothing is told twice"


def test_other_refusals(acted, locked):
    error_of(acted.post(PATH, FIELDS | {"model": "other"}), 404, "not_found_error")
    error_of(acted.post(f"{PATH}/count_tokens", FIELDS | {"model": "other"}), 404, "not_found_error")
    error_of(acted.post(f"{PATH}/count_tokens", {"messages": 3}), 400, "invalid_request_error")
    error_of(acted.client.get(PATH), 405, "invalid_request_error")
    error_of(acted.post(f"{PATH}/batches", {}), 404, "not_found_error")
    error_of(acted.client.post(PATH, content=b"{}"), 415, "invalid_request_error")
    error_of(acted.post(PATH, b" " * (2 << 20)), 413, "request_too_large")
    error_of(locked.post(PATH, FIELDS), 401, "authentication_error")
    with pytest.raises(anthropic.AuthenticationError), client_of(locked, "another-key") as client:
        client.messages.create(**FIELDS)
    with client_of(locked, KEY) as client:
        assert client.messages.create(**FIELDS).content[0].text == "ok"
    with anthropic.Anthropic(base_url=locked.url, auth_token=KEY, api_key=None) as client:
        assert client.messages.count_tokens(model=NAME, messages=USER).input_tokens > 2


def test_overload_and_loading_are_told_as_the_others(acted):
    acted.service.waiting_tokens = 10**9
    try:
        response = acted.post(PATH, FIELDS)
    finally:
        acted.service.waiting_tokens = 0
    error_of(response, 429, "rate_limit_error")
    assert response.headers["retry-after"] == "1"
    acted.service.state = "draining"
    try:
        for path in (PATH, f"{PATH}/count_tokens"):
            response = acted.post(path, FIELDS)
            error_of(response, 503, "overloaded_error")
            assert response.headers["retry-after"]
    finally:
        acted.service.state = "ready"


def test_a_failure_in_the_middle_is_an_event(acted):
    ids = acted.engine.lm.tokenizer.encode("hello").ids
    acted.engine.script = lambda prompt, sampling: [*ids, Output(finish_reason="error", error="nan")]
    events = events_of(acted.post(PATH, FIELDS | {"stream": True}).text)
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == "api_error"
    error_of(acted.post(PATH, FIELDS), 500, "api_error")
    with client_of(acted) as client, pytest.raises(anthropic.APIStatusError):
        with client.messages.stream(**FIELDS) as stream:
            stream.get_final_message()
