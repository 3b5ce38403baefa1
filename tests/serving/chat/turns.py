"""Generated texts, well formed and not, and how tests read them."""

from dsv4_jax.serving.chat import answer, parser
from dsv4_jax.serving.chat.messages import Tool

WEATHER = Tool(
    {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["location"],
        },
    }
)
FREE = Tool({"name": "f"})
TOOLS = (WEATHER, FREE)

EOS = "<｜end▁of▁sentence｜>"
OPEN, CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
END_INVOKE, END_PARAMETER = "</｜DSML｜invoke>", "</｜DSML｜parameter>"


def parameter(name: str, value: str, string: str | None = "true") -> str:
    flag = "" if string is None else f' string="{string}"'
    return f'<｜DSML｜parameter name="{name}"{flag}>{value}{END_PARAMETER}'


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameters) + f"\n{END_INVOKE}"


def block(*invokes: str) -> str:
    return OPEN + "\n" + "\n".join(invokes) + "\n" + CLOSE


PARIS = invoke("get_weather", parameter("location", "Paris"))
PARIS_ARGUMENTS = '{"location": "Paris"}'


class Read:
    """A turn that was read: the answer, its events, and what was mended."""

    def __init__(self, pieces, *, reasoning=False, tools=TOOLS, reason="stop", **more):
        numbers = iter(range(1000))
        reader = parser.AnswerParser(
            reasoning=reasoning, tools=tools, new_id=lambda: f"call_{next(numbers)}", **more
        )
        self.events = [event for piece in pieces for event in reader.feed(piece)]
        self.events += reader.finish(reason)
        self.answer = answer.answer_of(self.events)
        self.recoveries = dict(reader.recoveries)
        self.parser = reader
        assert [type(event) for event in self.events].count(answer.Finish) == 1
        assert isinstance(self.events[-1], answer.Finish)

    @property
    def calls(self):
        return [(call.name, call.arguments) for call in self.answer.tool_calls]

    def all(self):
        """What must not depend on how the text was cut."""
        return self.answer, self.recoveries


def read(text: str, **how) -> Read:
    """The text in one piece, after checking that cutting it anywhere, or into characters, changes nothing."""
    whole = Read([text], **how)
    assert Read(list(text), **how).all() == whole.all()
    step = max(1, len(text) // 60)
    for at in range(0, len(text), step):
        assert Read([text[:at], text[at:]], **how).all() == whole.all(), at
    return whole


CORPUS = {
    "plain": ("Hello\n\n", False),
    "reasoning": ("a\n\nb</think>c", True),
    "call": ("r</think>\n\n" + block(PARIS) + EOS, True),
    "two calls": ("Let me.\n\n" + block(PARIS, invoke("f")) + EOS, False),
    "no end of thinking": ("r\n\n" + block(PARIS), True),
    "quoted in reasoning": (f"the form {OPEN} or\n{OPEN}\nand so on</think>x", True),
    "quoted block in reasoning": (
        "\n" + block(invoke("$TOOL_NAME", parameter("a", "b"))) + "</think>x",
        True,
    ),
    "orphan": ("x\n\n" + PARIS + "tail", False),
    "orphan without what is required": ("x " + invoke("get_weather", parameter("days", "3")) + " y", False),
    "orphan that never closes": ('x <｜DSML｜invoke name="f"> y\n', False),
    "misspelt": ("x\n\n<｜DSML｜function_calls>\n" + PARIS + "\n</｜DSML｜function_calls>", False),
    "misspelt prose": ("x <｜DSML｜toolcalls> is the form", False),
    "unclosed": (f'{OPEN}<｜DSML｜invoke name="f"><｜DSML｜parameter name="a">1\n{CLOSE}', False),
    "unclosed parameter": (
        block(
            f'<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a">1\n{parameter("b", "2")}\n{END_INVOKE}'
        ),
        False,
    ),
    "cut": ("x\n\n" + block(PARIS, PARIS)[:-60], False),
    "empty": (f"a\n\n{OPEN}\n{CLOSE}\n\nb", False),
    "stray": (f"a{END_PARAMETER}b{END_INVOKE}c{CLOSE}d<think>e</think>f｜DSML｜g", False),
    "undeclared": ("a\n\n" + block(invoke("nope", parameter("a", "b"))) + "\n\nc", False),
    "after": (block(PARIS) + "\n\nDone.", False),
    "odd values": (
        block(invoke("f", parameter("a", "2>&1</parameter> <｜DSM <a<b"), parameter("b", "[1,", "false"))),
        False,
    ),
    "nested markers": ("<｜｜DSML｜DSML｜tool_calls>｜DS｜DSML｜ML｜｜", False),
    "junk between": (
        block(
            "words", f'<｜DSML｜invoke name="f"> junk {parameter("a", "1", None)} junk {END_INVOKE}', "junk"
        ),
        False,
    ),
    "header broken": (
        '<｜DSML｜invoke name=f">x</｜DSML｜invoke><｜DSML｜invokes><｜DSML｜parameter>',
        False,
    ),
}
