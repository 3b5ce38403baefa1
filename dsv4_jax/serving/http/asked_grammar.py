"""From a conversation to the grammar that its answer must keep, for OpenAI's and Anthropic's forms alike."""

import dataclasses

from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.grammar_text import Marker, answer_text, check_schema, check_tool
from dsv4_jax.serving.chat.messages import Conversation
from dsv4_jax.serving.chat.wire import Problems
from dsv4_jax.serving.http.errors import invalid
from dsv4_jax.serving.http.grammars import CompiledGrammar
from dsv4_jax.serving.http.service import Model


@dataclasses.dataclass(frozen=True)
class Paths:
    """How a request calls the fields that ask for a grammar.

    Attributes:
        form: of the response's format. schema: in it. tool: of a tool's schema, with a place for its number.
    """

    form: str
    schema: str
    tool: str


OPENAI = Paths("response_format", "response_format.json_schema.schema", "tools[{}].function.parameters")
ANTHROPIC = Paths("output_config.format", "output_config.format.schema", "tools[{}].input_schema")


def grammar_of(
    model: Model,
    conversation: Conversation,
    reasons: bool,
    paths: Paths = OPENAI,
    most_calls: int | None = None,
) -> CompiledGrammar | None:
    """The grammar of a response format and of a tool choice; None if the answer is free.

    A response format with tools that may be called ("auto") allows a call in place of the value; tools that
    must be called leave no place for one. It compiles: call it in a thread.

    Args:
        conversation: checked. reasons: the answer begins in its reasoning, which the grammar leaves alone.
        paths: names of the request's fields.
        most_calls: that the answer may have; None: one of a tool that is chosen by name, else any number.

    Raises:
        HttpProblem: 400 for what cannot be kept, 429 if too many grammars are compiled now.
    """
    choice, form = conversation.tool_choice, conversation.response_format
    must_call = choice not in ("none", "auto")
    if form == "text" and not must_call:
        return None
    path = "tool_choice" if must_call else paths.form
    problems = Problems()
    if model.grammars is None or model.chat is None:
        raise invalid([f"{path}: needs a tokenizer.json, which is not there"])
    opens_after = model.chat.control_ids.get(control.END_THINK) if reasons else None
    if reasons and opens_after is None:
        problems.say(path, f"with reasoning needs a tokenizer that has {control.END_THINK}")
    if conversation.messages and conversation.messages[-1].unfinished:
        problems.say(path, "cannot be kept by an answer that continues a message")
    schema = None
    if not must_call:
        schema = {"type": "object"} if form == "json_object" else conversation.response_schema
        check_schema(paths.schema, schema, problems)
    tools = [tool for tool in conversation.tools if not isinstance(choice, tuple) or tool.name in choice]
    for number, tool in enumerate(conversation.tools):
        if tool in tools:
            check_tool(paths.tool.format(number), tool, problems)
    marker_id = model.chat.control_ids.get(control.DSML)
    if tools and marker_id is None:
        problems.say(path, "with tools needs a tokenizer that has the marker of calls as a token")
    if problems:
        raise invalid(problems)
    marker = None if marker_id is None else Marker(marker_id)
    if most_calls is None and isinstance(choice, tuple):
        most_calls = 1
    text = answer_text(schema, tools, marker, most_calls)
    where = paths.schema if form == "json_schema" and not must_call else path
    return model.grammars.compiled(text, opens_after, where)
