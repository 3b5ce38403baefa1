"""Schemas without a model: what is drawn at random under their grammars keeps them, and the hostile ones are
refused with a rule."""

import dataclasses
import json
import random
import time

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_jax.serving.chat import answer
from dsv4_jax.serving.chat.grammar_text import Marker, answer_text, check_schema, check_tool
from dsv4_jax.serving.chat.messages import Tool
from dsv4_jax.serving.chat.tokens import AnswerTokens, chat_tokenizer
from dsv4_jax.serving.chat.wire import Problems
from dsv4_jax.serving.http.errors import HttpProblem
from dsv4_jax.serving.http.grammars import COMPILE_SECONDS, Grammars
from tests.serving.http import served
from tests.serving.http.kept_schemas import SCHEMAS, closed

SIZE, EOS = served.CONFIG.vocab_size, 1
TOKENIZER = served.tokenizer_with_marks()
CHAT = chat_tokenizer(TOKENIZER, 0, (EOS,))
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "uuid", "email"])
MARKER = TOKENIZER.token_to_id("｜DSML｜")
ENDS = frozenset('"]}/<@')
HURRY = 40
"""Tokens after which a walk takes what closes strings and containers, wherever it may."""


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER, SIZE, (EOS,))


def keeps(value, schema):
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)


def drawn(grammar, seed, most=1500):
    """Tokens that the grammar allows, drawn at random until it may end."""
    chance, state = random.Random(seed), grammar.begin()
    words, tokens = np.zeros(-(-SIZE // 32), np.uint32), []
    while len(tokens) < most:
        state.allowed(words)
        allowed = [id for id in range(SIZE) if words[id // 32] >> (id % 32) & 1 and id != EOS]
        assert allowed or state.may_end()
        hurries = len(tokens) > HURRY
        if state.may_end() and (not allowed or hurries or chance.random() < 0.3):
            return tokens
        if hurries and MARKER in allowed and chance.random() < 0.7:
            allowed = [MARKER]
        elif hurries:
            allowed = [id for id in allowed if TOKENIZER.id_to_token(id) in ENDS] or allowed
        tokens.append(chance.choice(allowed))
        assert state.take(tokens[-1])
    raise AssertionError(f"no end after {most} tokens")


def asked(schema):
    problems = Problems()
    check_schema("schema", schema, problems)
    assert not problems
    return answer_text(schema, [], None, None)


ONE_WAY = ("null", "empty string", "const of a number")


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_drawn_under_a_schema_keeps_it(grammars, name):
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    grammar = grammars.compiled(asked(schema), None, "schema")
    texts = {TOKENIZER.decode(drawn(grammar, seed), skip_special_tokens=False) for seed in range(12)}
    for text in texts:
        keeps(json.loads(text), schema)
    assert len(texts) > 1 or name in ONE_WAY, "nothing was drawn at random"


def calls_of(ids, tools):
    """The calls that the parser finds in these tokens."""
    parser = CHAT.parser(reasoning=False, tools=tools)
    reader = AnswerTokens(CHAT, parser)
    found = answer.answer_of([*reader.add(ids), *reader.finish()])
    assert found.content is None and found.finish_reason == "tool_calls" and not parser.recoveries
    return [(call.name, json.loads(call.arguments)) for call in found.tool_calls]


@pytest.mark.parametrize("name", SCHEMAS)
def test_calls_that_are_drawn_keep_the_schema_of_a_parameter(grammars, name):
    schema = SCHEMAS[name]
    refers = "$ref" in json.dumps(schema)
    inner = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
    parameters = closed(text={"type": "string"}, x=inner)
    if refers:  # from the root, where the definitions are then
        if '"#"' in json.dumps(schema) or "#/properties" in json.dumps(schema):
            pytest.skip("points into its own root, which a parameter is not")
        parameters |= {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    tools = (Tool({"name": "f", "parameters": parameters}), Tool({"name": "g"}))
    problems = Problems()
    for tool in tools:
        check_tool("tool", tool, problems)
    assert not problems
    grammar = grammars.compiled(answer_text(None, tools, Marker(MARKER), 3), None, "tools")
    names = set()
    for seed in range(6):
        for called, arguments in calls_of(drawn(grammar, seed), tools):
            names.add(called)
            keeps(arguments, parameters if called == "f" else {"maxProperties": 0})
    assert "f" in names


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "enum of 50 000": ({"enum": list(range(50_000))}, "larger than"),
    "values in enums": ({"enum": [0] * 5001}, "values in its enums"),
    "many properties": ({"properties": {f"p{i}": {"type": "integer"} for i in range(10_000)}}, "larger than"),
    "many schemas": ({"anyOf": [{}] * 10_001}, "schemas in it"),
    "a loop": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
               "no value satisfies it"),
    "itself": ({"$ref": "#"}, "no value"),
    "far away": ({"$ref": "file:///etc/passwd"}, "same schema"),
    "products of choices": ({"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(3)]}
                                       for i in range(12)]}, "beyond the limits"),
    "patterns at once": ({"allOf": [{"type": "string", "pattern": f"a{{1,{i + 50}}}.*b.*{i}"}
                                    for i in range(20)]}, ""),
    "a great multiple": ({"type": "integer", "multipleOf": 999_999_937, "minimum": 3}, ""),
    "great bounds": ({"type": "integer", "minimum": -(10**300), "maximum": 10**300}, "bounds"),
    "lengths that contradict": ({"type": "string", "minLength": 5, "maxLength": 3}, "no value"),
    "half a length": ({"type": "string", "minLength": 5.5}, "length"),
    "a negative length": ({"type": "string", "maxLength": -1}, "length"),
    "names of two patterns": ({"patternProperties": {"a": {"const": 1}, "b": {"const": 2}}}, "same name"),
    "bad pattern": ({"type": "string", "pattern": "foo**("}, "pattern"),
    "a schema that is none": ({"properties": {"a": 3}}, "must be a schema"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_in_time_with_a_rule(grammars, name):
    schema, rule = HOSTILE[name]
    start, problems = time.monotonic(), Problems()
    check_schema("schema", schema, problems)
    if problems:
        message = problems[0]
    else:
        with pytest.raises(HttpProblem) as refused:
            grammars.compiled(asked(schema), None, "schema")
        assert refused.value.status == 400
        message = refused.value.message
    assert message.startswith("schema") and rule in message and len(message) < 400
    assert time.monotonic() - start < COMPILE_SECONDS + 5


@pytest.mark.parametrize("schema", [
    nested(60), {"type": "string", "pattern": "^((((a{1,30}){1,30}){1,30}){1,30}){1,30}$"},
    {"type": "string", "maxLength": 10**9}, {"type": "array", "items": {"type": "null"}, "minItems": 10**6},
    {"type": "string", "pattern": "(\\p{L}|\\w){5000}"}, {"anyOf": [{"const": f"x{i}"} for i in range(5000)]},
])  # fmt: skip
def test_great_schemas_cost_little_at_a_step(grammars, schema):
    """Those that are not refused: a walk under them is bounded in time, and is never in an error."""
    state = grammars.compiled(asked(schema), None, "schema").begin()
    words, chance = np.zeros(-(-SIZE // 32), np.uint32), random.Random(0)
    start = time.monotonic()
    for _ in range(60):
        state.allowed(words)
        allowed = [id for id in range(SIZE) if words[id // 32] >> (id % 32) & 1 and id != EOS]
        if not allowed:
            assert state.may_end()
            break
        assert state.take(chance.choice(allowed))
    assert time.monotonic() - start < 10


def test_what_takes_too_long_delays_nobody_else_and_is_there_for_the_next(monkeypatch):
    grammars, begun = Grammars(TOKENIZER, SIZE, (EOS,)), []
    compile_one = grammars._compile

    def slow(text):
        begun.append(text)
        time.sleep(0.6)
        return compile_one(text)

    quick = asked({"type": "boolean"})
    grammars.compiled(quick, None, "schema")
    monkeypatch.setattr("dsv4_jax.serving.http.grammars.COMPILE_SECONDS", 0.1)
    monkeypatch.setattr(grammars, "_compile", slow)
    good, bad = asked({"const": "slow"}), asked({"enum": [], "title": "slow"})
    for _ in range(2):
        for text in (good, bad):
            with pytest.raises(HttpProblem, match="takes longer"):
                grammars.compiled(text, None, "schema")
    with pytest.raises(HttpProblem) as refused:
        grammars.compiled(asked({"const": "third"}), None, "schema")
    assert refused.value.status == 429
    grammars.compiled(quick, None, "schema")
    served.until(lambda: not grammars._running)
    assert sorted(begun) == sorted([good, bad]), "nothing is begun twice"
    assert drawn(grammars.compiled(good, None, "schema"), 0)
    with pytest.raises(HttpProblem, match="no value"):
        grammars.compiled(bad, None, "schema")


KEYS = (
    "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "multipleOf",
    "exclusiveMaximum", "$ref", "items", "additionalProperties", "additionalItems", "anyOf", "allOf", "oneOf",
    "prefixItems", "properties", "patternProperties", "$defs", "definitions", "title", "not", "if",
    "x-guidance",
)  # fmt: skip
WORDS = ("string", "integer", "number", "object", "array", "null", "boolean", "#", "#/$defs/a", "a", "date",
         "^a+$", "(", "a{9}", "\\d", "[", "", "ä", "🙂")  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 60) | st.integers() | st.floats() | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS + WORDS), inner, max_size=4)
    ),
    max_leaves=14,
)
schemas = st.dictionaries(st.sampled_from(KEYS), values, max_size=5)


@pytest.fixture(scope="module")
def server():
    """With grammars, and an engine that answers at once."""
    model = served.acted_model()
    running = served.Served(dataclasses.replace(model, grammars=Grammars(TOKENIZER, SIZE, (EOS,))))
    yield running
    served.until(running.idle)
    running.close()


def test_one_call_at_a_time_is_part_of_the_grammar(server):
    tool = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
    most = {}
    for parallel in (False, True):
        asked = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": parallel}
        assert server.chat(**asked).status_code == 200
        grammar = server.engine.asked[-1][1].grammar
        drawn_calls = [calls_of(drawn(grammar, seed), (Tool({"name": "g"}),)) for seed in range(8)]
        most[parallel] = max(map(len, drawn_calls))
    assert most[False] == 1 < most[True]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas | values, st.sampled_from(["format", "tool", "message format", "message tool"]))
def test_no_schema_is_a_fault_of_the_server(server, schema, where):
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": served.NAME, "messages": messages, "max_tokens": 3}
    if where == "format":
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        body |= {"response_format": form}
    elif where == "tool":
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        body |= {"tools": [tool], "tool_choice": "required"}
    elif where == "message format":
        body |= {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    else:
        body |= {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}}
    path = "/v1/messages" if where.startswith("message") else "/v1/chat/completions"
    response = server.post(path, json.dumps(body, allow_nan=True).encode())
    assert response.status_code in (200, 400, 429), response.text
    if response.status_code == 400:
        assert "Traceback" not in response.text
