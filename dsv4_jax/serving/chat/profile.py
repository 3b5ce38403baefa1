"""Profiles of the chat format: the words of a release around tools, effort and response schemas.

The format changed between releases: the same sentence means the greatest effort in the preview and a high one
later, and a wrong profile changes what a model does without any error. The long sentences of the releases are
not part of this project. They are read from the `encoding` folder of the checkpoint itself, as text: string
constants found by parsing, known by their SHA-256, and never executed. A checkpoint without that folder, such
as one that was trained here, gets `OWN`.
"""

import ast
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from dsv4_jax.errors import CheckpointError, ProblemsError
from dsv4_jax.reading.folder import Folder
from dsv4_jax.reading.stored_file import StoredFile
from dsv4_jax.reading.strict_json import JsonError, parse_json, shown
from dsv4_jax.serving.chat import control

ENCODING_FOLDER = "encoding"
ENCODING_FILE = "encoding_dsv4.py"
MAX_ENCODING_BYTES = 2**20
MAX_PROFILE_BYTES = 2**18
EFFORTS = ("low", "high", "max")
NO_THINKING = "none"

_PREVIEW_ALIASES = {"low": "high", "medium": "high", "high": "high", "xhigh": "max", "max": "max"}
_OFFICIAL_ALIASES = {
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}

KNOWN = MappingProxyType(
    {
        "tools block": "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8",
        "response format": "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5",
        "effort A": "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
        "effort B": "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
    }
)
"""SHA-256 of the literals of the releases, as they stand in their encoders (with place-holders in braces)."""

_MARK_OF_OFFICIAL = "DEFAULT_REASONING_EFFORT"
_FIRST_LINE_OF_B = "Reasoning Effort: Beyond maximum"
_NEEDED = {
    "preview": ("tools block", "response format", "effort A"),
    "official": ("tools block", "response format", "effort A", "effort B"),
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """The words of one release.

    Attributes:
        name: "preview", "official", "own", or what a file says.
        tools_block: text before and after the tools' schemas.
        response_format: text before and after the schema of a response.
        effort_prefixes: by effort, the text in front of a conversation with thinking.
        aliases: what clients may say -> effort.
        default_effort: of a request that says nothing.
    """

    name: str
    tools_block: tuple[str, str]
    response_format: tuple[str, str]
    effort_prefixes: Mapping[str, str]
    aliases: Mapping[str, str]
    default_effort: str = "high"

    def effort(self, asked: object) -> tuple[bool, str]:
        """(whether to think, effort) for what a client asked for; None asks for nothing.

        Raises:
            ValueError: the profile does not know it.
        """
        if asked is None:
            return True, self.default_effort
        if asked == NO_THINKING:
            return False, self.default_effort
        if isinstance(asked, str) and asked in self.aliases:
            return True, self.aliases[asked]
        known = ", ".join([NO_THINKING, *self.aliases])
        said = f"{shown(asked)} must be" if isinstance(asked, str) else "must be"
        raise ValueError(f"{said} one of {known}")


_D = control.DSML
OWN = Profile(
    name="own",
    tools_block=(
        f"""## Tools

These tools are at your service. To use some of them, end your answer with one block of this form:

<{_D}tool_calls>
<{_D}invoke name="NAME OF THE TOOL">
<{_D}parameter name="NAME OF THE ARGUMENT" string="true or false">VALUE</{_D}parameter>
</{_D}invoke>
</{_D}tool_calls>

A block may hold several calls, and a call any number of arguments. Text is written as it is, with \
string="true"; numbers, truth values, lists and objects are written as JSON, with string="false".

The tools, one JSON object a line:

""",
        "\n\nUse no other names than these, and give every required argument.\n",
    ),
    response_format=("## Form of the response\n\nAnswer with JSON that this schema accepts:\n", ""),
    effort_prefixes=MappingProxyType(
        {
            "low": "",
            "high": "",
            "max": "Effort: the greatest. Think through every step and every case, and check the result.\n\n",
        }
    ),
    aliases=MappingProxyType(_OFFICIAL_ALIASES),
)
"""For checkpoints that bring no words of their own. These are ours."""


def choose_profile(folder: str | Path, choice: str = "auto") -> tuple[Profile, str]:
    """The profile for a checkpoint folder.

    Args:
        folder: of the checkpoint.
        choice: "auto" takes what the folder's encoder is, or `OWN` without one; "preview" and "official" take
            the words from the folder's encoder and insist on that release; "own" is `OWN`; anything else is
            the path of a file, see `read_profile`.

    Returns:
        (profile, one sentence that says what was chosen and why).

    Raises:
        ProblemsError: the file cannot be read, or lacks words that the release needs.
    """
    if choice == "own":
        return OWN, "chat profile own, as asked for"
    if choice not in ("auto", *_NEEDED):
        profile = read_profile(choice)
        return profile, f"chat profile {profile.name}, from {choice}"
    text = _encoder_of(Path(folder))
    if text is None:
        if choice == "auto":
            return OWN, f"chat profile own: the checkpoint has no {ENCODING_FOLDER}/{ENCODING_FILE}"
        problem = f"the checkpoint has no {ENCODING_FOLDER}/{ENCODING_FILE} to take its words from"
        raise ProblemsError(f"chat profile {choice} cannot be used", [problem])
    profile = released_profile(text, choice)
    return profile, f"chat profile {profile.name}, by {ENCODING_FOLDER}/{ENCODING_FILE}"


def released_profile(text: str, choice: str = "auto") -> Profile:
    """The profile of a release, with the words in the source text of its encoder.

    Args:
        text: Python source. It is parsed and never executed; a literal is one of the known ones or unused.
        choice: "preview", "official", or "auto", which tells them apart by the text.

    Raises:
        ProblemsError: the text is no Python, or lacks literals; it names all of them.
    """
    found = known_literals(text)
    if choice == "auto":
        official = _MARK_OF_OFFICIAL in text and _FIRST_LINE_OF_B in text
        choice = "official" if official else "preview"
    if missing := [name for name in _NEEDED[choice] if name not in found]:
        problems = [f"no string constant has the SHA-256 of the {name}: {KNOWN[name]}" for name in missing]
        raise ProblemsError(f"chat profile {choice} cannot be taken from this encoder", problems)
    a, b = found["effort A"], found.get("effort B", "")
    prefixes = {"low": "", "high": "", "max": a} if choice == "preview" else {"low": "", "high": a, "max": b}
    return Profile(
        name=choice,
        tools_block=_around(_with_tokens(found["tools block"]), "{tool_schemas}"),
        response_format=_around(found["response format"], "{schema}"),
        effort_prefixes=MappingProxyType(prefixes),
        aliases=MappingProxyType(_PREVIEW_ALIASES if choice == "preview" else _OFFICIAL_ALIASES),
    )


def known_literals(text: str) -> dict[str, str]:
    """Name -> literal, of the string constants in a Python source that are among `KNOWN`.

    Raises:
        ProblemsError: the text is no Python.
    """
    names = {digest: name for name, digest in KNOWN.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the source, such as an escape that Python will not keep
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        problem = f"cannot be parsed as Python ({type(error).__name__})"
        raise ProblemsError("the encoder of the checkpoint cannot be read", [problem]) from None
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            digest = hashlib.sha256(node.value.encode("utf-8", "surrogatepass")).hexdigest()
            if digest in names:
                found[names[digest]] = node.value
    return found


def read_profile(path: str | Path) -> Profile:
    """A profile of a file: an encoder's source (`.py`), or a JSON object.

    The object has the keys `name`, `tools_block` and `response_format` (texts with the place-holders
    `{tool_schemas}` and `{schema}`), `effort_prefixes` (efforts -> text), and may have `aliases` and
    `default_effort`.

    Raises:
        ProblemsError: the file cannot be read or is no such object, with every problem.
    """
    path = Path(path)
    with StoredFile(path) as file:
        data = file.read_document(MAX_ENCODING_BYTES if path.suffix == ".py" else MAX_PROFILE_BYTES)
    if path.suffix == ".py":
        return released_profile(_decoded(data, path.name))
    what = f"chat profile {path} cannot be used"
    try:
        raw = parse_json(data, max_depth=4, max_items=1000)
    except JsonError as error:
        raise ProblemsError(what, [str(error)]) from None
    if problems := _file_problems(raw):
        raise ProblemsError(what, problems)
    return Profile(
        name=raw["name"],
        tools_block=_around(_with_tokens(raw["tools_block"]), "{tool_schemas}"),
        response_format=_around(raw["response_format"], "{schema}"),
        effort_prefixes=MappingProxyType(dict.fromkeys(EFFORTS, "") | raw["effort_prefixes"]),
        aliases=MappingProxyType(raw.get("aliases", _OFFICIAL_ALIASES)),
        default_effort=raw.get("default_effort", "high"),
    )


def profile_json(profile: Profile) -> str:
    """The JSON text of a profile, as `read_profile` reads it."""
    record = {
        "name": profile.name,
        "tools_block": "{tool_schemas}".join(profile.tools_block),
        "response_format": "{schema}".join(profile.response_format),
        "effort_prefixes": dict(profile.effort_prefixes),
        "aliases": dict(profile.aliases),
        "default_effort": profile.default_effort,
    }
    return json.dumps(record, ensure_ascii=False, indent=1)


def _file_problems(raw: object) -> list[str]:
    if not isinstance(raw, dict):
        return ["must be a JSON object"]
    problems = []
    for key, gap in (("name", ""), ("tools_block", "{tool_schemas}"), ("response_format", "{schema}")):
        if not isinstance(raw.get(key), str):
            problems.append(f"{key}: must be a text")
        elif gap and raw[key].count(gap) != 1:
            problems.append(f"{key}: must hold {gap} exactly once")
    for key in ("effort_prefixes", "aliases"):
        value = raw.get(key, {} if key == "aliases" else None)
        texts = isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
        efforts = value if key == "effort_prefixes" else value.values() if texts else ()
        if not texts:
            problems.append(f"{key}: must be an object of texts")
        elif wrong := sorted(set(efforts) - set(EFFORTS)):
            problems.append(f"{key}: {shown(wrong)} must be among {', '.join(EFFORTS)}")
    if raw.get("default_effort", "high") not in EFFORTS:
        problems.append(f"default_effort: must be one of {', '.join(EFFORTS)}")
    return problems


def _encoder_of(directory: Path) -> str | None:
    """The source text of a checkpoint's encoder, by the rule for all files of a checkpoint; None without."""
    if not (directory / ENCODING_FOLDER).is_dir():
        return None
    with Folder(directory / ENCODING_FOLDER, allow_links=_blobs_of(directory)) as folder:
        data = folder.read_if_present(ENCODING_FILE, MAX_ENCODING_BYTES)
    return None if data is None else _decoded(data, ENCODING_FILE)


def _blobs_of(directory: Path) -> Path | None:
    """Where links of a hub's cache lead, which lies two folders above a snapshot."""
    home = directory.resolve()
    blobs = home.parent.parent / "blobs"
    in_cache = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return blobs if in_cache and blobs.is_dir() else None


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} cannot be used", [f"is not UTF-8 (byte {error.start})"]) from None


def _with_tokens(template: str) -> str:
    tokens = {
        "{dsml_token}": control.DSML,
        "{thinking_start_token}": control.THINK,
        "{thinking_end_token}": control.END_THINK,
    }
    for gap, token in tokens.items():
        template = template.replace(gap, token)
    return template


def _around(template: str, gap: str) -> tuple[str, str]:
    before, _, after = template.partition(gap)
    return before, after
