"""Fields of OpenAI's form: what is refused is told by the name of its field, in words of the interface."""

import pytest

from tests.serving.chat.turns import PARIS, block
from tests.serving.http.served import error_of, events_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hello wörld"}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (CHAT, {"stream_options": 3}, "stream_options", "must be an object"),
        (CHAT, {"logit_bias": {"99999": 1}}, "logit_bias", "0..319"),
        (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids", "0..319"),
        (CHAT, {"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        (CHAT, {"model": "gpt-4"}, "model", "/v1/models"),
        (CHAT, {"messages": [{"role": "ü", "content": "x"}]}, "messages[0].role", "must be one of"),
        (COMPLETIONS, {"prompt": [320]}, "prompt", "0..319"),
        (COMPLETIONS, {"prompt": [[5], [-3]]}, "prompt", "0..319"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not offered"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of", "not offered"),
    ],
)
def test_refusals_name_their_field(acted, path, fields, param, words):
    body = ({"messages": USER} if path == CHAT else {}) | {"max_tokens": 8} | fields
    error = error_of(acted.post(path, body), 404 if "model" in fields else 400)
    assert error["param"] == param and words in error["message"] and "dictionary" not in error["message"]


def test_an_empty_suffix_is_none(acted):
    for suffix in ("", None):
        assert acted.post(COMPLETIONS, {"prompt": "a", "suffix": suffix}).status_code == 200


@pytest.mark.parametrize(("parallel", "count"), [(None, 2), (True, 2), (False, 1)])
def test_one_call_at_a_time(acted, parallel, count):
    acted.engine.say(block(PARIS, PARIS))
    response = acted.chat(tools=[WEATHER], parallel_tool_calls=parallel, max_tokens=2000)
    assert len(response.json()["choices"][0]["message"]["tool_calls"]) == count


def test_markers_that_are_kept_out_of_a_content_are_counted(acted):
    before = acted.metric("dsml_leak_guard_total")
    spelt = acted.service.loaded.chat.literal.encode(block(PARIS), add_special_tokens=False).ids
    acted.engine.script = lambda prompt, sampling: [*spelt, 1]
    choice = acted.chat(tools=[WEATHER], max_tokens=2000).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and not choice["message"].get("tool_calls")
    assert "｜DSML｜" not in choice["message"]["content"] and "Paris" in choice["message"]["content"]
    assert acted.metric("dsml_leak_guard_total") == before + block(PARIS).count("｜DSML｜")


def test_log_probabilities_of_several_streamed_choices(acted):
    acted.engine.say("hello wörld 🙂")
    fields = {"stream": True, "n": 3, "logprobs": True, "top_logprobs": 1}
    events = events_of(acted.chat(**fields).text)
    counts, texts = [0] * 3, [""] * 3
    for choice in (choice for each in events for choice in each["choices"]):
        found = (choice.get("logprobs") or {}).get("content") or []
        assert all(len(each["top_logprobs"]) == 1 for each in found)
        counts[choice["index"]] += len(found)
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == ["hello wörld 🙂"] * 3 and len(set(counts)) == 1 and counts[0] > 2
