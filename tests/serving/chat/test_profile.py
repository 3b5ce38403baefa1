"""Profiles: which release, its words out of the checkpoint's own encoder, aliases, and files."""

import dataclasses
import itertools
import sys

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.chat import messages, profile, render
from tests.serving.chat import official
from tests.serving.chat.official import needs_data

ALIASES = {
    "preview": {"low": "high", "medium": "high", "high": "high", "xhigh": "max", "max": "max"},
    "official": {
        "minimal": "low",
        "low": "low",
        "medium": "high",
        "high": "high",
        "xhigh": "high",
        "max": "max",
        "ultra": "max",
    },
}


def encoder(folder, text):
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text(text, encoding="utf-8")
    return folder


@needs_data
@pytest.mark.parametrize("choice", ["preview", "official"])
def test_a_release_is_told_by_its_encoder(tmp_path, choice):
    found, why = profile.choose_profile(
        encoder(tmp_path, official.encoder_source(official=choice == "official"))
    )
    assert found == official.released(choice) and found.name == choice
    assert why == f"chat profile {choice}, by encoding/encoding_dsv4.py"
    assert found.aliases == ALIASES[choice] and found.default_effort == "high"
    assert profile.choose_profile(tmp_path, "preview")[0].name == "preview"


@needs_data
@pytest.mark.parametrize(
    ("choice", "effort", "thinking", "system"),
    list(itertools.product(["preview", "official"], ["low", "high", "max"], [True, False], [True, False])),
)
def test_prefixes_of_efforts(choice, effort, thinking, system):
    found = official.released(choice)
    a, b = official.literal("effort_a.txt"), official.literal("effort_b.txt")
    prefix = {"preview": {"max": a}, "official": {"high": a, "max": b}}[choice].get(effort, "")
    if choice == "preview" and effort == "low":
        assert found.effort("low") == (True, "high")
    given = [messages.text_message("system", "S")] * system + [messages.text_message("user", "q")]
    text = render.text_of(render.render(given, found, thinking=thinking, effort=effort))
    expected = (prefix if thinking else "") + "S" * system + "<｜User｜>q"
    assert text.startswith("<｜begin▁of▁sentence｜>" + expected)
    assert ("Reasoning Effort" in text) == bool(prefix and thinking)


@needs_data
def test_the_default_of_the_official_profile_is_high():
    given = [messages.text_message("user", "q")]
    text = render.text_of(render.render(given, official.released("official")))
    assert official.literal("effort_a.txt") in text


@pytest.mark.parametrize("asked", ["none", None, "most", "", "HIGH"])
def test_efforts_that_clients_ask_for(asked):
    if asked in ("none", None):
        assert profile.OWN.effort(asked) == (asked is None, "high")
    else:
        with pytest.raises(ValueError, match="must be one of none, minimal, low"):
            profile.OWN.effort(asked)


def test_without_an_encoder_the_words_are_our_own(tmp_path):
    found, why = profile.choose_profile(tmp_path)
    assert found is profile.OWN and "no encoding/encoding_dsv4.py" in why
    for choice in ("preview", "official"):
        with pytest.raises(ProblemsError, match="to take its words from"):
            profile.choose_profile(tmp_path, choice)
    (tmp_path / "encoding").mkdir()
    assert profile.choose_profile(tmp_path)[0] is profile.OWN
    assert profile.choose_profile(tmp_path / "absent", "own")[0] is profile.OWN


@needs_data
def test_literals_that_are_missing_are_all_named(tmp_path):
    encoder(tmp_path, official.encoder_source(["tools_template.txt"]))
    with pytest.raises(ProblemsError) as refused:
        profile.choose_profile(tmp_path, "official")
    assert [problem.split(":")[0] for problem in refused.value.problems] == [
        "no string constant has the SHA-256 of the response format",
        "no string constant has the SHA-256 of the effort A",
        "no string constant has the SHA-256 of the effort B",
    ]


@needs_data
def test_a_literal_that_was_changed_is_not_one():
    changed = official.encoder_source().replace("absolutely no assumption", "no assumption")
    assert set(profile.known_literals(changed)) == {"tools block", "response format", "effort B"}


@needs_data
def test_literals_in_any_spelling_of_python():
    """Adjacent strings, keys of dicts, defaults of arguments: whatever is one constant."""
    text = official.literal("effort_a.txt")
    half = len(text) // 2
    source = f"def f(x={{'a': ({text[:half]!r}\n{text[half:]!r})}}):\n    '''\\d'''\n"
    assert profile.known_literals(source) == {"effort A": text}


def test_an_encoder_is_never_executed(tmp_path):
    """Nothing is imported, compiled to code or opened for writing from the folder."""
    canary = tmp_path / "canary"
    text = f"open({str(canary)!r}, 'w')\nimport os\nos.system('touch {canary}')\n"
    encoder(tmp_path, text)
    seen, watching = [], [True]

    def hook(event, arguments):  # it cannot be taken away again
        if watching and event in ("exec", "import", "os.system", "subprocess.Popen"):
            seen.append((event, str(arguments)))

    sys.addaudithook(hook)
    with pytest.raises(ProblemsError):
        profile.choose_profile(tmp_path)
    watching.clear()
    assert not canary.exists()
    assert [each for each in seen if "encoding_dsv4" in each[1] or str(tmp_path) in each[1]] == []


@pytest.mark.parametrize(
    "text",
    ["def f(:", "\0", "(" * 100_000, "x = " + "-" * 200_000 + "1", "a." * 50_000 + "b", "é = '\\N{no}'"],
)
def test_an_encoder_that_is_no_python_is_refused(tmp_path, text):
    encoder(tmp_path, text)
    with pytest.raises(ProblemsError):
        profile.choose_profile(tmp_path)


def test_an_encoder_that_is_too_large_or_a_link_elsewhere_is_refused(tmp_path):
    encoder(tmp_path, "#" * (profile.MAX_ENCODING_BYTES + 1))
    with pytest.raises(ProblemsError, match="bytes; at most"):
        profile.choose_profile(tmp_path)
    path = tmp_path / "encoding" / "encoding_dsv4.py"
    path.unlink()
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text("x = 1")
    path.symlink_to(elsewhere)
    with pytest.raises(ProblemsError, match="leaves the directory"):
        profile.choose_profile(tmp_path)
    path.unlink()
    path.write_bytes(b"\xff")
    with pytest.raises(ProblemsError, match="is not UTF-8"):
        profile.choose_profile(tmp_path)


def test_a_profile_can_be_a_file(tmp_path):
    path = tmp_path / "words.json"
    other = dataclasses.replace(profile.OWN, name="mine", default_effort="low")
    path.write_text(profile.profile_json(other), encoding="utf-8")
    found, why = profile.choose_profile(tmp_path, str(path))
    assert dict(found.effort_prefixes) == dict(other.effort_prefixes)
    assert dataclasses.replace(found, effort_prefixes={}, aliases={}) == dataclasses.replace(
        other, effort_prefixes={}, aliases={}
    )
    assert why == f"chat profile mine, from {path}"


@needs_data
def test_a_profile_can_be_the_file_of_another_checkpoint(tmp_path):
    path = tmp_path / "encoding_dsv4.py"
    path.write_text(official.encoder_source(official=True), encoding="utf-8")
    assert profile.choose_profile(tmp_path, str(path))[0] == official.released("official")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("{", 1),
        ("[]", 1),
        ("{}", 4),
        (
            '{"name": 1, "tools_block": "x", "response_format": "{schema}{schema}",'
            ' "effort_prefixes": {"most": ""}}',
            4,
        ),
        (
            '{"name": "n", "tools_block": "{tool_schemas}", "response_format": "{schema}",'
            ' "effort_prefixes": {"max": 1}, "aliases": {"a": "b"}, "default_effort": "x"}',
            3,
        ),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_every_problem(tmp_path, text, count):
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(ProblemsError) as refused:
        profile.read_profile(path)
    assert len(refused.value.problems) == count


def test_our_own_words_are_our_own():
    """They hold the tags of the format, which are not ours to choose, and no sentence of the releases."""
    before, after = profile.OWN.tools_block
    assert "<｜DSML｜tool_calls>" in before and after.endswith("\n")
    if official.DATA.is_dir():
        for name in official.LITERALS:
            theirs = {line for line in official.literal(name).split("\n") if len(line) > 25}
            ours = {*(before + after).split("\n"), *profile.OWN.response_format[0].split("\n")}
            ours |= set("".join(profile.OWN.effort_prefixes.values()).split("\n"))
            assert not theirs & ours
