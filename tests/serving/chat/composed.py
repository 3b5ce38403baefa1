"""The layout of prompts, composed anew from its rules: a second opinion about `render`, on plain dicts.

Written as a list of turns that are first decided and then joined, over strings; nothing of `render` is used.
"""

import json

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
TASK_TOKENS = {
    name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")
}


def dumps(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def composed(conversation, *, thinking, drop, prefix, tools_block, response_format) -> str:
    """The prompt of messages in OpenAI's form (with strings as contents, and tools on system messages)."""
    turns = joined_turns(conversation)
    if any(turn.get("tools") for turn in turns if turn["role"] != "user"):
        drop = False
    last = max([i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")], default=-1)
    if thinking and drop:
        kept = [i for i, turn in enumerate(turns) if not (turn["role"] == "developer" and i < last)]
        last = kept.index(last) if last >= 0 else -1
        turns = [turns[i] for i in kept]
    text = BOS + (prefix if thinking else "")
    for i, turn in enumerate(turns):
        fresh = not drop or i > last
        after_task = i > 0 and turns[i - 1].get("task") is not None
        text += BODIES[turn["role"]](
            turn, thinking and fresh and not after_task, tools_block, response_format
        )
        next_role = turns[i + 1]["role"] if i + 1 < len(turns) else "assistant"
        if next_role not in ("assistant", "latest_reminder"):
            continue
        opened = "<think>" if thinking and (not drop or i >= last) else "</think>"
        if turn.get("task") == "action":
            text += ASSISTANT + ("<think>" if thinking else "</think>") + TASK_TOKENS["action"]
        elif turn.get("task"):
            text += TASK_TOKENS[turn["task"]]
        elif turn["role"] in ("user", "developer"):
            text += ASSISTANT + opened
    return text


def joined_turns(conversation):
    """Users' messages and tools' results that follow each other, as one turn of blocks."""
    turns, order = [], []
    for message in conversation:
        if message["role"] == "assistant" and message.get("tool_calls"):
            order = [call.get("id") for call in message["tool_calls"]]
        if message["role"] not in ("user", "tool"):
            turns.append(message)
            continue
        is_result = message["role"] == "tool"
        block = (is_result, message.get("tool_call_id"), message["content"])
        joins = turns and turns[-1]["role"] == "user" and (is_result or not turns[-1].get("task"))
        if joins:
            turns[-1]["blocks"].append(block)
        else:
            turns.append(
                {"role": "user", "blocks": [block], "task": None if is_result else message.get("task")}
            )
        blocks = turns[-1]["blocks"]
        results = [each for each in blocks if each[0]]
        results.sort(key=lambda each: order.index(each[1]) if each[1] in order and each[1] else 0)
        turns[-1]["blocks"] = [results.pop(0) if each[0] else each for each in blocks]
    return turns


def tails(turn, tools_block, response_format):
    text = ""
    if turn.get("tools"):
        text += "\n\n" + "\n".join(dumps(each["function"]) for each in turn["tools"]).join(tools_block)
    if turn.get("response_format") is not None:
        text += "\n\n" + dumps(turn["response_format"]).join(response_format)
    return text


def user(turn, *_):
    results = {True: "<tool_result>{}</tool_result>", False: "{}"}
    return USER + "\n\n".join(results[block[0]].replace("{}", block[2]) for block in turn["blocks"])


def assistant(turn, reasons, *_):
    text = turn.get("content") or ""
    if reasons:
        text = (turn.get("reasoning_content") or "") + "</think>" + text
    if turn.get("tool_calls"):
        text = text[: len(text) - len(turn["content"] or "")] + (turn["content"] or "").rstrip("\n")
        calls = []
        for call in turn["tool_calls"]:
            lines = [f'<｜DSML｜invoke name="{call["function"]["name"]}">']
            lines.append("\n".join(values(call["function"]["arguments"])))
            calls.append("\n".join([*lines, "</｜DSML｜invoke>"]))
        text += "\n\n" + "\n".join(["<｜DSML｜tool_calls>", *calls, "</｜DSML｜tool_calls>"])
    return text + ("" if turn.get("prefix") else EOS)


def values(arguments):
    for key, value in json.loads(arguments).items():
        is_string = isinstance(value, str)
        text = value if is_string else dumps(value)
        flag = "true" if is_string else "false"
        yield f'<｜DSML｜parameter name="{key}" string="{flag}">{text}</｜DSML｜parameter>'


BODIES = {
    "system": lambda turn, _, *literals: turn["content"] + tails(turn, *literals),
    "developer": lambda turn, _, *literals: USER + turn["content"] + tails(turn, *literals),
    "latest_reminder": lambda turn, *_: REMINDER + turn["content"],
    "user": user,
    "assistant": assistant,
}
