"""`dsv4 chat`: what can be typed, what is printed, and a real conversation in a pseudo-terminal."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from dsv4_jax.command_line import chat
from dsv4_jax.command_line import main as cli
from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import messages
from dsv4_jax.serving.chat.answer import Answer, ContentDelta, Finish, ReasoningDelta
from dsv4_jax.serving.chat.manner import Manner
from dsv4_jax.serving.chat.profile import OWN
from tests.serving.chat import small


class Scripted:
    """Stands for a session: says what it is told to, and remembers what it was asked."""

    def __init__(self, *answers):
        self.profile, self.manner = OWN, Manner(max_new_tokens=7)
        self.tokenizer = small.chat_tokenizer()
        self.messages, self.asked = [], []
        self._answers = iter(answers)

    def reset(self):
        self.messages = []

    def answer(self, words):
        self.asked.append(words)
        self.messages += [messages.text_message("user", words), Answer("r", "x").message()]
        yield from next(self._answers, [ContentDelta("ok"), Finish("stop")])


def talk(session, *lines, styled=False):
    """What is printed when these lines are typed."""
    given = iter(lines)

    def read_line(_):
        line = next(given, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    out = io.StringIO()
    chat.converse(session, read_line, out, styled=styled)
    assert next(given, None) is None, "not all lines were read"
    return out.getvalue()


THOUGHT = [
    ReasoningDelta("Hm"),
    ReasoningDelta("m."),
    ContentDelta("He"),
    ContentDelta("llo"),
    Finish("stop"),
]


def test_thinking_is_dimmed_on_a_terminal_and_on_its_own_lines_everywhere():
    assert talk(Scripted(THOUGHT), "a", styled=True) == "\x1b[2mHmm.\x1b[0m\nHello\n\n"
    assert talk(Scripted(THOUGHT), "a") == "Hmm.\nHello\n\n"
    only = [ReasoningDelta("Hm"), Finish("length")]
    assert (
        talk(Scripted(only), "a", styled=True)
        == "\x1b[2mHm\x1b[0m\n(cut: at most 7 new tokens, or no room left)\n\n"
    )


def test_nothing_that_a_model_writes_changes_the_terminal():
    said = [ContentDelta("a\x1b[2Jb\r\x07\x9bc\td"), Finish("stop")]
    assert talk(Scripted(said), "a", styled=True) == "a\ufffd[2Jb\ufffd\ufffd\ufffdc\td\n\n"


def test_text_of_several_lines():
    session = Scripted()
    talk(
        session, "one\\", "two\\", "three", '"""first', "", 'last"""', '"""', "x", '"""', '"""y"""', "", "  "
    )
    assert session.asked == ["one\ntwo\nthree", "first\n\nlast", "x", "y"]


def test_lines_with_a_slash():
    session = Scripted()
    said = talk(
        session, "a", "/reset", "//help", "/help", "/nothing\x1b", "/effort none", "/effort max", "/effort x"
    )
    assert session.asked == ["a", "/help"] and len(session.messages) == 2
    assert "(forgotten)" in said and "/save FILE" in said and "there is no /nothing\ufffd" in said
    assert "(no thinking)" in said and "(effort max)" in said and "'x' must be one of none, " in said
    assert (session.manner.thinking, session.manner.effort) == (True, "max")
    assert talk(Scripted(), "/quit") == ""


def test_saving_a_conversation(tmp_path):
    session, name = Scripted(), str(tmp_path / "talk.json")
    said = talk(
        session, "é", f"/save {name}", f"/save {name}", "/save", f"/save {tmp_path}/no/such", "/save a\0b"
    )
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["messages"] == [
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "x", "reasoning_content": "r"},
    ]
    for told in ("2 messages saved", "is there already", "needs the name", "No such file", "null byte"):
        assert told in said


def test_ctrl_c_stops_an_answer_and_not_the_program():
    def slow():
        yield ContentDelta("a")
        os.kill(os.getpid(), signal.SIGINT)
        yield ContentDelta("b")
        yield ContentDelta("never")

    before = signal.getsignal(signal.SIGINT)
    session = Scripted(slow())
    assert talk(session, "x", "y") == "ab\n(stopped)\nok\n\n"
    assert session.asked == ["x", "y"] and signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_within_a_step():
    def stuck():
        yield ContentDelta("a")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        yield ContentDelta("never")

    assert talk(Scripted(stuck()), "x", "y") == "a\n(stopped)\nok\n\n"


def test_ctrl_c_between_answers_forgets_the_line():
    session = Scripted()
    assert "/quit leaves" in talk(session, KeyboardInterrupt(), "y") and session.asked == ["y"]


def test_what_a_model_refuses_is_said_and_the_conversation_goes_on():
    def refused():
        raise ProblemsError("cannot answer", ["too long"])
        yield

    assert talk(Scripted(refused()), "x", "y") == "(too long)\nok\n\n"


def test_efforts_and_what_a_user_should_know():
    session = Scripted()
    assert chat.begin(session, "xhigh") == [] and session.manner.effort == "high"
    with pytest.raises(ProblemsError, match="'most' must be one of none"):
        chat.begin(session, "most")
    session.tokenizer = small.chat_tokenizer(())
    (remark,) = chat.begin(session, None)
    assert "turns stand under headings (### Question)" in remark and not session.manner.thinking
    session.profile = dataclasses.replace(OWN, name="other")
    assert "written as text" in chat.begin(session, None)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chat") / "checkpoint"
    small.model().save(directory)
    return str(directory)


QUICKLY = ("--dtype", "float32", "--no-compilation-cache", "--max-new-tokens", "4")


def test_lines_from_a_pipe(capsys, monkeypatch, checkpoint, tmp_path):
    """The whole command in this process, without a terminal."""
    name = tmp_path / "saved.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n/save {name}\nand more\n/quit\nnever\n"))
    assert cli.run(["chat", checkpoint, *QUICKLY, "--system", "S", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert "messages saved" in captured.out and "\x1b" not in captured.out
    assert "chat profile own: the checkpoint has no encoding/encoding_dsv4.py" in captured.err
    saved = json.loads(name.read_text(encoding="utf-8"))["messages"]
    assert saved[0] == {"role": "system", "content": "S"}


def test_what_cannot_be_is_refused(capsys, monkeypatch, checkpoint, tmp_path):
    assert cli.run(["chat", checkpoint, "--top-p", "0", "--max-new-tokens", "0"]) == 2
    assert "cannot chat: 2 problems" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        assert cli.run(["chat", checkpoint]) == 2
    assert "standard input is closed" in capsys.readouterr().err
    for arguments, told in (
        (("--chat-profile", "official"), "no encoding/encoding_dsv4.py to take its words from"),
        (("--chat-profile", str(tmp_path / "none.json")), "cannot be opened"),
        (("--effort", "most"), "must be one of none"),
    ):
        with open(os.devnull) as nothing, contextlib.redirect_stdout(io.StringIO()):
            before, sys.stdin = sys.stdin, nothing
            try:
                assert cli.run(["chat", checkpoint, *QUICKLY, *arguments]) == 2
            finally:
                sys.stdin = before
        assert told in capsys.readouterr().err


OWN_TERMINAL = """
import fcntl, os, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from dsv4_jax.command_line.main import main
main()
"""
"""The command with its standard input as the terminal whose keys send signals."""


@pytest.mark.slow
def test_a_conversation_in_a_terminal(checkpoint):
    """Typed, stopped with Ctrl-C, and left: the program ends well."""
    main, side = pty.openpty()
    command = [sys.executable, "-c", OWN_TERMINAL, "chat", checkpoint, *QUICKLY[:3]]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    command += ["--max-new-tokens", "600"]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    seen = b""

    def until(pattern, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 65536)
        found, seen = seen, b""
        return found

    try:
        until(rb"> ")
        os.write(main, b"hello\n")
        until(rb"\x1b\[2m.")
        os.write(main, b"\x03")
        until(rb"\(stopped\)\r\n.*> ")
        os.write(main, b"/reset\n")
        until(rb"\(forgotten\)\r\n.*> ")
        os.write(main, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
