"""The control strings of V4's chat format. In the released tokenizers each of them is one token.

Everything else in a prompt is ordinary text, also where it looks like one of these.
"""

import re

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
ACTION = "<｜action｜>"
TASKS = {
    "action": ACTION,
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
"""Quick instructions: the name of a task and the token that asks for it."""

ENDS_OF_TURN = (BOS, USER, ASSISTANT, REMINDER)
"""Tokens that only a prompt may hold: a model that draws one has left its turn, which ends there."""

CONTROL = (BOS, EOS, USER, ASSISTANT, REMINDER, THINK, END_THINK, DSML, *TASKS.values())

_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL)) + ")")


def split_control(text: str) -> list[str]:
    """`text` of ours cut around the control strings in it; these are at the odd indices."""
    return _CONTROL.split(text)
