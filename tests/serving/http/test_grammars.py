"""Answers under a grammar, over a real engine whose weights are random: what comes is valid all the same."""

import dataclasses
import json
from typing import Literal

import anthropic
import jsonschema
import openai
import pydantic
import pytest

from tests.serving.http import served
from tests.serving.test_core import nothing_compiled

SHORT = {"type": "string", "maxLength": 4}
SCHEMAS = [
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["wörld", "你好", 3, None]},
    {"const": {"a": [1, "🙂"]}},
    SHORT,
    {"type": "string", "pattern": "^[a-c]{2}-\\d$"},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "number", "minimum": 0, "maximum": 9},
    {"type": ["boolean", "null"]},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 9}]},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}, SHORT], "items": False, "minItems": 2},
    {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 1, "items": {"const": 1}}},
    {
        "type": "object",
        "properties": {"名": SHORT, "b": {"type": "object", "properties": {"c": {"enum": [1, 2]}},
                                          "required": ["c"], "additionalProperties": False}},
        "required": ["名", "b"],
        "additionalProperties": False,
    },
    {
        "$defs": {"tree": {"type": "object", "additionalProperties": False, "required": ["v"], "properties": {
            "v": {"type": "boolean"},
            "below": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/tree"}}}}},
        "$ref": "#/$defs/tree",
    },
    {"allOf": [{"type": "object", "properties": {"a": {"enum": [1]}}, "additionalProperties": False},
               {"required": ["a"]}]},
]  # fmt: skip


def asked(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.fixture(scope="module")
def server():
    """One with room for prompts with schemas."""
    sizes = dataclasses.replace(served.SIZES, max_length=2048)
    with served.engine_of(served.model_with_text(), sizes) as engine:
        running = served.Served(served.model_of(engine))
        yield running
        running.close()


@pytest.fixture(scope="module")
def ends(server):
    """A bias towards what ends strings and containers: random weights would go on for long."""
    encode = server.engine.lm.tokenizer.encode
    return {str(encode(each, add_special_tokens=False).ids[0]): 20 for each in '"]}'}


@pytest.mark.parametrize("heat", [0, 1])
def test_answers_keep_their_schemas(server, ends, heat):
    with nothing_compiled():
        for seed, schema in enumerate(SCHEMAS):
            response = server.chat(
                response_format=asked(schema), temperature=heat, seed=seed, logit_bias=ends, max_tokens=200
            )
            assert response.status_code == 200, (schema, response.text)
            choice = response.json()["choices"][0]
            assert choice["finish_reason"] == "stop", (schema, choice)
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_calls_that_must_be_made_keep_the_schemas_of_their_tools(server, ends):
    tools = [
        {"type": "function", "function": {"name": "look", "parameters": LOOK}},
        {"type": "function", "function": {"name": "wait"}},
    ]
    named = {"type": "function", "function": {"name": "look"}}
    encode = server.engine.lm.tokenizer.encode
    bias = {str(encode(each, add_special_tokens=False).ids[0]): 30 for each in "</"}  # towards the ends
    for choice in ("required", named):
        for seed in range(3):
            response = server.chat(
                tools=tools, tool_choice=choice, seed=seed, max_tokens=400, logit_bias=bias
            )
            assert response.status_code == 200, response.text
            answer = response.json()["choices"][0]
            assert answer["finish_reason"] == "tool_calls", answer
            for call in answer["message"]["tool_calls"]:
                if call["function"]["name"] == "look":
                    jsonschema.validate(json.loads(call["function"]["arguments"]), LOOK)
                else:
                    assert choice == "required"


def test_openai_client_and_reasoning(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-")
    answer = client.chat.completions.create(
        model=served.NAME,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=400,
        seed=1,
        response_format=asked({"enum": ["yes", "no"]}),
        logit_bias={str(server.engine.lm.tokenizer.token_to_id("</think>")): 5},
    )
    message = answer.choices[0].message
    assert message.reasoning_content and json.loads(message.content) in ("yes", "no")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {}}, "not is not supported"),
        ({"properties": {"a": {"if": {}}}}, "if is not supported"),
        ({"$ref": "http://127.0.0.1:1/x"}, "must point into the same schema"),
        ({"$ref": "#"}, "no value satisfies it"),
        ({"$ref": "#/$defs/none"}, "$ref"),
        ({"type": "string", "pattern": "foo**("}, "pattern"),
        ({"type": "string", "pattern": "(?=x)a"}, "pattern"),
        ({"type": "string", "format": "nonsense"}, "format"),
        ({"type": "unknown"}, "type"),
        ({"enum": []}, "no value"),
        ({"x-guidance": {"lenient": True}, "type": "object"}, "not supported"),
    ],
)
def test_what_cannot_be_kept_is_refused(server, schema, words):
    response = server.chat(response_format=asked(schema))
    assert words in served.error_of(response, 400)["message"], response.text


def test_a_grammar_and_stop_tokens_contradict(server):
    for field in ({"ignore_eos": True}, {"min_tokens": 2}, {"stop_token_ids": [5]}):
        error = served.error_of(server.chat(response_format={"type": "json_object"}, **field), 400)
        assert error["param"] == next(iter(field))


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {}}, "required": [["a"]]},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {'a"': {}}},
        {"properties": {"a": 3}},
        {"properties": {"a": False}, "required": ["a"]},
        {"anyOf": [{}]},
        {"type": ["object"]},
    ],
)
def test_schemas_of_tools_that_cannot_be_kept_are_refused(server, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    served.error_of(server.chat(tools=[tool], tool_choice="required"), 400)


LOOK = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "count": {"type": "integer", "minimum": 0, "maximum": 9},
                   "kind": {"$ref": "#/$defs/kind"}},
    "required": ["count", "kind"],
    "$defs": {"kind": {"enum": ["p", "q"]}},
}  # fmt: skip
MESSAGE_TOOLS = [
    {"name": "look", "input_schema": LOOK},
    {"name": "wait", "input_schema": {"type": "object", "properties": {"s": {"const": 3}}}},
]
MESSAGE = {"model": served.NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400}
ANY, NAMED = {"type": "any"}, {"type": "tool", "name": "look"}


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def towards_ends(server):
    """As `ends`, for calls; and towards the end of the reasoning where there is one."""
    encode = server.engine.lm.tokenizer.encode
    bias = {str(encode(each, add_special_tokens=False).ids[0]): 40 for each in "</"}
    return bias | {str(server.engine.lm.tokenizer.token_to_id("</think>")): 41}


@pytest.mark.parametrize("thinking", ["disabled", "adaptive"])
@pytest.mark.parametrize("choice", [ANY, NAMED, ANY | {"disable_parallel_tool_use": True}])
def test_messages_whose_tools_must_be_called_keep_their_schemas(client, towards_ends, choice, thinking):
    asked = MESSAGE | {"tools": MESSAGE_TOOLS, "tool_choice": choice, "thinking": {"type": thinking}}
    counts = []
    for seed in range(2):
        more = {"extra_body": {"seed": seed, "logit_bias": towards_ends}}
        whole = client.messages.create(**asked, **more)
        with client.messages.stream(**asked, **more) as stream:
            streamed = stream.get_final_message()
        assert whole.stop_reason == streamed.stop_reason == "tool_use", whole
        said = [(each.type, getattr(each, "input", None)) for each in whole.content]
        assert said == [(each.type, getattr(each, "input", None)) for each in streamed.content]
        calls = [each for each in whole.content if each.type == "tool_use"]
        assert {each.type for each in whole.content} <= {"tool_use", "thinking"}
        counts.append(len(calls))
        for call in calls:
            schema = next(each["input_schema"] for each in MESSAGE_TOOLS if each["name"] == call.name)
            jsonschema.validate(call.input, schema)
            assert choice["type"] == "any" or call.name == "look"
    assert min(counts) >= 1
    assert "disable_parallel_tool_use" not in choice or counts == [1] * 2


class Verdict(pydantic.BaseModel):
    """What the client makes a schema of, and of the answer an object."""

    kind: Literal["yes", "no"]
    ok: bool


@pytest.mark.parametrize("thinking", ["disabled", "adaptive"])
def test_messages_keep_the_format_that_is_asked_for(client, server, ends, thinking):
    end = {str(server.engine.lm.tokenizer.token_to_id("</think>")): 41}
    asked = MESSAGE | {"thinking": {"type": thinking}, "extra_body": {"logit_bias": ends | end, "seed": 2}}
    found = client.messages.parse(**asked, output_format=Verdict)
    assert found.stop_reason == "end_turn" and isinstance(found.parsed_output, Verdict)
    schema = {"type": "object", "properties": {"名": {"enum": ["你好"]}}, "required": ["名"],
              "additionalProperties": False}  # fmt: skip
    form = {"format": {"type": "json_schema", "schema": schema}}
    with client.messages.stream(**asked, output_config=form) as stream:
        final = stream.get_final_message()
    assert {each.type for each in final.content} <= {"thinking", "text"}
    assert json.loads(final.content[-1].text) == {"名": "你好"}


@pytest.mark.parametrize(
    ("changed", "path"),
    [
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
         "output_config.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"enum": []}}}},
         "output_config.format.schema"),
        ({"tools": [{"name": "f", "input_schema": {"anyOf": [{}]}}], "tool_choice": ANY},
         "tools[0].input_schema"),
        ({"tools": MESSAGE_TOOLS, "tool_choice": ANY, "ignore_eos": True}, "ignore_eos"),
        ({"tools": MESSAGE_TOOLS, "tool_choice": ANY,
          "messages": [*MESSAGE["messages"], {"role": "assistant", "content": "Well,"}]}, "tool_choice"),
    ],
)  # fmt: skip
def test_messages_that_cannot_keep_a_grammar_are_refused_by_their_own_names(server, changed, path):
    response = server.post("/v1/messages", MESSAGE | changed)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"].startswith(path)
