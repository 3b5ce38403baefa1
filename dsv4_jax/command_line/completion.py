"""`dsv4 generate`: a prompt of text or of token ids, continued piece by piece or as one record."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dsv4_jax.config import quantities
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
    draft: str | None = None


def checked_request(text: str | None, ids: Sequence[int], sampling: Sampling) -> str | list[int]:
    """The one prompt that was given. What is checked here needs no model, so it is said before one is loaded.

    Raises:
        ProblemsError: for no prompt or both kinds, and for numbers outside their range; all at once.
    """
    problems = []
    if (text is not None) == bool(ids):
        problems.append("give a prompt as text, or as --ids, and not both")
    if text is not None and not _is_unicode(text):
        problems.append("the prompt holds bytes that are no UTF-8 text")
    bad = [i for i in ids if i < 0]
    if bad:
        problems.append(f"--ids {bad[:5]}: token ids start at 0")
    checks = (
        quantities.integer_problem("--max-new-tokens", sampling.max_new_tokens, 0),
        quantities.seed_problem(sampling.seed),
        *quantities.sampling_problems(sampling.temperature, sampling.top_p),
    )
    problems += [problem for problem in checks if problem]
    if problems:
        raise ProblemsError("cannot generate", problems)
    return list(ids) if text is None else text


def _is_unicode(text: str) -> bool:
    """False for bytes of the command line that are no text: they arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def stream(model: "LanguageModel", prompt: str | list[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of the continuation, ready to print one after the other: text, or ids with spaces.

    Raises:
        ProblemsError: for a prompt or sampling values that the model refuses, and for a model whose logits
            are no numbers.
    """
    pieces = model.stream_text if isinstance(prompt, str) else _stream_ids(model)
    iterator = pieces(
        prompt,
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        draft=sampling.draft,
    )
    try:
        first = next(iterator, None)
    except ValueError as refused:  # arguments are checked when the first piece is asked for
        raise ProblemsError("cannot generate", [str(refused)]) from refused
    except FloatingPointError as broken:
        raise ProblemsError("cannot generate", [str(broken)]) from broken
    if first is None:
        return
    yield first
    try:
        yield from iterator
    except FloatingPointError as broken:
        raise ProblemsError("cannot go on", [str(broken)]) from broken


def complete(model: "LanguageModel", prompt: str | list[int], sampling: Sampling) -> dict[str, object]:
    """The whole continuation as a JSON-ready record; errors as `stream`."""
    start = time.perf_counter()
    pieces = list(stream(model, prompt, sampling))
    record: dict[str, object] = {"prompt": prompt, "sampling": dataclasses.asdict(sampling)}
    if isinstance(prompt, str):
        record["text"] = "".join(pieces)
    else:
        record["ids"] = [int(piece) for piece in pieces]
    if model.acceptance is not None:
        record["accepted"] = model.acceptance.accepted[0]
        record["drafted"] = model.acceptance.drafted[0]
    return record | {"seconds": round(time.perf_counter() - start, 3)}


def acceptance_line(model: "LanguageModel") -> str | None:
    """How the drafts of the last continuation fared, in one line; None if it had none."""
    if model.acceptance is None:
        return None
    accepted, steps = sum(model.acceptance.accepted[0]), len(model.acceptance.accepted[0])
    ratios = ", ".join(f"{right} of {all_}" for right, all_ in model.acceptance.by_position() if all_)
    pace = f"{(accepted + steps) / steps:.2f} tokens a step" if steps else "no step"
    return f"drafts: {accepted} accepted in {steps} steps, {pace}; by position: {ratios or 'none'}"


def _stream_ids(model: "LanguageModel"):
    def pieces(prompt: list[int], max_new_tokens: int, **sampling: float) -> Iterator[str]:
        separator = ""
        for token in model.stream_ids(prompt, max_new_tokens, **sampling):
            yield f"{separator}{token}"
            separator = " "

    return pieces
