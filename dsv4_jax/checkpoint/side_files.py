"""The small files beside the weights, read whole before any weight is, and written from memory.

generation_config.json and tokenizer_config.json are JSON objects, of which only the token ids that end a
text are used. tokenizer.json is a tokenizer. A file that cannot be read is a reason to refuse the checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from tokenizers import Tokenizer

from dsv4_jax.config import ModelConfig, json_objects, rules
from dsv4_jax.config.keys import Keys
from dsv4_jax.errors import CheckpointError
from dsv4_jax.reading.folder import Folder
from dsv4_jax.reading.strict_json import JsonError, shown

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SIDE_FILES = (GENERATION_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
MAX_TOKENIZER_BYTES = 256 * 2**20  # the released ones: 8 MB

UseTokenizer = Literal["read", "ignore"]
"""'ignore' opens neither tokenizer.json nor tokenizer_config.json: the model then takes and gives ids only,
and none of the two is written when it is saved."""


@dataclasses.dataclass(frozen=True)
class SideFiles:
    """What was found.

    Attributes:
        contents: file name -> bytes, of those `SIDE_FILES` that are there.
        tokenizer: of tokenizer.json, if there is one.
    """

    contents: Mapping[str, bytes]
    tokenizer: Tokenizer | None


def read_side_files(
    folder: Folder, vocab_size: int | None, tokenizer: UseTokenizer = "read"
) -> tuple[SideFiles, list[str]]:
    """Reads the side files of an open folder.

    Args:
        folder: of the checkpoint.
        vocab_size: that token ids must keep to; None if the config could not be read.
        tokenizer: whether to use tokenizer.json.

    Returns:
        (files, problems), each problem naming its file.
    """
    contents: dict[str, bytes] = {}
    problems: list[str] = []
    made = None
    for name in SIDE_FILES:
        if tokenizer == "ignore" and name != GENERATION_FILE:
            continue
        largest = MAX_TOKENIZER_BYTES if name == TOKENIZER_FILE else json_objects.MAX_JSON_BYTES
        try:
            data = folder.read_if_present(name, largest)
        except CheckpointError as error:
            problems += error.problems
            continue
        if data is None:
            continue
        contents[name] = data
        if name == TOKENIZER_FILE:
            made, found = _tokenizer(data)
        else:
            found = _object_problems(name, data, vocab_size)
        problems += [f"{name}: {problem}" for problem in found]
    return SideFiles(contents, made), problems


def stop_token_ids(config: ModelConfig, side_files: Mapping[str, bytes]) -> tuple[int, ...]:
    """The ids that end a text unless others are asked for: the EOS of both configs, without repetition.

    Raises:
        CheckpointError: generation_config.json is not usable.
    """
    ids = rules.token_ids(config.eos_token_id)
    if GENERATION_FILE in side_files:
        eos, problems = _generation_eos(side_files[GENERATION_FILE], config.vocab_size)
        if problems:
            raise CheckpointError(f"{GENERATION_FILE} cannot be used", problems)
        ids += eos
    return tuple(dict.fromkeys(ids))


def with_tokenizer(side_files: Mapping[str, bytes], tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The side files of a model with this tokenizer.

    The bytes of tokenizer.json stay as they are while they still describe the tokenizer in memory; without a
    tokenizer neither that file nor its configuration is kept.
    """
    files = dict(side_files)
    if tokenizer is None:
        files.pop(TOKENIZER_FILE, None)
        files.pop(TOKENIZER_CONFIG_FILE, None)
        return files
    held, _ = _tokenizer(files[TOKENIZER_FILE]) if TOKENIZER_FILE in files else (None, [])
    if held is None or held.to_str() != tokenizer.to_str():
        files[TOKENIZER_FILE] = tokenizer.to_str(pretty=True).encode()
    return files


def _tokenizer(data: bytes) -> tuple[Tokenizer | None, list[str]]:
    try:
        return Tokenizer.from_buffer(data), []
    except ValueError as error:
        return None, [f"is no tokenizer that can be read ({shown(str(error))[1:-1]}); download it again"]


def _object_problems(name: str, data: bytes, vocab_size: int | None) -> list[str]:
    if name == GENERATION_FILE:
        return _generation_eos(data, vocab_size)[1]
    try:
        return json_objects.parse_object(data)[1]
    except JsonError as error:
        return [str(error)]


def _generation_eos(data: bytes, vocab_size: int | None) -> tuple[tuple[int, ...], list[str]]:
    """The EOS ids of a generation_config.json, and what is wrong with the file."""
    try:
        raw, problems = json_objects.parse_object(data)
    except JsonError as error:
        return (), [str(error)]
    keys = Keys(raw, problems)
    ids = {"bos_token_id": keys.token("bos_token_id"), "eos_token_id": keys.tokens("eos_token_id")}
    if vocab_size is not None:
        for name, value in ids.items():
            problems += rules.token_problems(name, value, vocab_size)
    return rules.token_ids(ids["eos_token_id"]), problems
