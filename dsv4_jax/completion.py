"""`dsv4 generate`: a prompt of text or of token ids, continued piece by piece or as one record."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dsv4_jax.errors import ProblemsError

if TYPE_CHECKING:
    from dsv4_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw tokens. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def checked_prompt(text: str | None, ids: Sequence[int]) -> str | list[int]:
    """The one prompt that was given.

    Raises:
        ProblemsError: if there is none, or both kinds.
    """
    if (text is not None) == bool(ids):
        raise ProblemsError("cannot generate", ["give a prompt as text, or as --ids, and not both"])
    return list(ids) if text is None else text


def stream(model: "LanguageModel", prompt: str | list[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of the continuation, ready to print one after the other: text, or ids with spaces.

    Raises:
        ProblemsError: for a prompt or sampling values that the model refuses.
    """
    pieces = model.stream_text if isinstance(prompt, str) else _stream_ids(model)
    iterator = pieces(
        prompt,
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    try:
        first = next(iterator, None)
    except ValueError as refused:  # arguments are checked when the first piece is asked for
        raise ProblemsError("cannot generate", [str(refused)]) from refused
    if first is not None:
        yield first
        yield from iterator


def complete(model: "LanguageModel", prompt: str | list[int], sampling: Sampling) -> dict[str, object]:
    """The whole continuation as a JSON-ready record; errors as `stream`."""
    start = time.perf_counter()
    pieces = list(stream(model, prompt, sampling))
    record: dict[str, object] = {"prompt": prompt, "sampling": dataclasses.asdict(sampling)}
    if isinstance(prompt, str):
        record["text"] = "".join(pieces)
    else:
        record["ids"] = [int(piece) for piece in pieces]
    return record | {"seconds": round(time.perf_counter() - start, 3)}


def _stream_ids(model: "LanguageModel"):
    def pieces(prompt: list[int], max_new_tokens: int, **sampling: float) -> Iterator[str]:
        separator = ""
        for step in model.stream([prompt], max_new_tokens, **sampling):
            if int(step[0]) == model.config.eos_token_id:
                return
            yield f"{separator}{int(step[0])}"
            separator = " "

    return pieces
