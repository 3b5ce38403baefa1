"""`dsv4 chat`: a conversation in a terminal. Reasoning is dimmed; Ctrl-C ends an answer, not the program."""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat.answer import ContentDelta, Finish, ReasoningDelta
from dsv4_jax.serving.chat.headings import QUESTION, uses_headings
from dsv4_jax.serving.chat.to_openai import message_to_openai

if TYPE_CHECKING:
    from dsv4_jax.serving.chat.session import ChatSession

HELP = """\
/reset         forget the conversation
/save FILE     write it to a new JSON file
/effort WORD   how much to think before an answer: {efforts}
/help          this list
/quit          leave (so does Ctrl-D)
A line that ends with \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
Ctrl-C ends an answer. A line that begins with // is said with one slash less."""

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
QUOTES = '"""'

# Nothing that a model writes may move the cursor or change the terminal.
_VISIBLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def begin(session: "ChatSession", effort: str | None) -> list[str]:
    """Sets the effort that was asked for, and returns what the user should know.

    Raises:
        ProblemsError: the profile knows no such effort.
    """
    tokenizer = session.tokenizer
    if effort is None and not tokenizer.knows_thinking:
        effort = "none"
    try:
        thinking, effort = session.profile.effort(effort)
    except ValueError as refused:
        raise ProblemsError("cannot chat", [f"--effort {refused}"]) from refused
    session.manner = dataclasses.replace(session.manner, thinking=thinking, effort=effort)
    if not tokenizer.missing:
        return []
    if uses_headings(tokenizer, session.profile):
        form = f"turns stand under headings ({QUESTION.strip()})"
    else:
        form = "they are written as text, which the model may not know"
    missing, example = len(tokenizer.missing), tokenizer.missing[0]
    return [
        f"note: {missing} marks of the chat format, such as {example}, are no tokens of this tokenizer:"
        f" {form}, and words of users can imitate them"
    ]


def converse(
    session: "ChatSession", read_line: Callable[[str], str], out: TextIO, *, styled: bool = False
) -> None:
    """Talks until there is nothing more to read.

    Args:
        session: the conversation.
        read_line: given a prompt, returns a line without its end; raises EOFError at the end of everything.
        out: where answers go.
        styled: whether `out` is a terminal that can dim text.
    """
    while True:
        try:
            words = _read_words(read_line)
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print("\n(/quit leaves)", file=out)
            continue
        if words.startswith("/") and not words.startswith("//"):
            if not _command(session, words, out):
                return
        elif words.strip():
            _answer(session, words[1:] if words.startswith("//") else words, out, styled)


def _read_words(read_line: Callable[[str], str]) -> str:
    line = read_line("> ")
    if line.lstrip().startswith(QUOTES):
        lines = [line.lstrip().removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(read_line(". "))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(". "))
    return "\n".join(lines)


def _command(session: "ChatSession", words: str, out: TextIO) -> bool:
    """Does what a line with a slash says; False to leave."""
    name, _, argument = words.strip().partition(" ")
    argument = argument.strip()
    efforts = ["none", *session.profile.aliases]
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        print(HELP.format(efforts=" ".join(efforts)), file=out)
    elif name == "/reset":
        session.reset()
        print("(forgotten)", file=out)
    elif name == "/save":
        print(_save(session, argument), file=out)
    elif name == "/effort":
        try:
            thinking, effort = session.profile.effort(argument)
        except ValueError as refused:
            print(f"(effort {refused})", file=out)
        else:
            session.manner = dataclasses.replace(session.manner, thinking=thinking, effort=effort)
            print(f"(effort {effort})" if thinking else "(no thinking)", file=out)
    else:
        print(f"(there is no {name}; /help lists what there is)".translate(_VISIBLE), file=out)
    return True


def _save(session: "ChatSession", name: str) -> str:
    if not name:
        return "(/save needs the name of a file)"
    record = {"messages": [message_to_openai(message) for message in session.messages]}
    try:
        with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
            json.dump(record, file, ensure_ascii=False, indent=1)
            file.write("\n")
    except FileExistsError:
        return f"({name} is there already: choose another name)"
    except (OSError, ValueError) as failure:
        return f"(cannot write {name}: {getattr(failure, 'strerror', None) or failure})"
    return f"({len(session.messages)} messages saved in {name})"


def _answer(session: "ChatSession", words: str, out: TextIO, styled: bool) -> None:
    """Prints an answer while it comes."""
    dimmed = False
    last = "\n"
    reason = None

    def show(text: str, dim: bool) -> None:
        nonlocal dimmed, last
        text = text.translate(_VISIBLE)
        if dim != dimmed:
            mark = (DIM if dim else PLAIN) if styled else ""
            gap = "\n" if not dim and last != "\n" else ""
            print(mark + gap, end="", file=out)
            dimmed = dim
        print(text, end="", file=out, flush=True)
        last = text[-1:] or last

    with _interruptible() as asked, contextlib.closing(session.answer(words)) as events:
        try:
            for event in events:
                match event:
                    case ReasoningDelta(text):
                        show(text, True)
                    case ContentDelta(text):
                        show(text, False)
                    case Finish(reason):
                        pass
                if asked.is_set():
                    break
        except ProblemsError as refused:
            reason = "; ".join(refused.problems)
        except KeyboardInterrupt:  # a second Ctrl-C, in the middle of a step
            asked.set()
    print((PLAIN if styled and dimmed else "") + ("" if last == "\n" else "\n"), end="", file=out)
    if asked.is_set():
        print("(stopped)", file=out)
    elif reason == "length":
        print(f"(cut: at most {session.manner.max_new_tokens} new tokens, or no room left)", file=out)
    elif reason not in ("stop", "tool_calls"):
        print(f"({reason})", file=out)
    out.flush()


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """While the block runs, the first Ctrl-C sets the event, and the next one interrupts."""
    asked = threading.Event()

    def interrupt(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread is told of signals
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def terminal_lines() -> Callable[[str], str]:
    """A reader of standard input: with editing and a history on a terminal, and without prompts elsewhere."""
    if sys.stdin is None:
        raise ProblemsError("cannot chat", ["standard input is closed"])
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - `input` edits lines with it
        return input

    def line(_: str) -> str:
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.removesuffix("\n")

    return line
