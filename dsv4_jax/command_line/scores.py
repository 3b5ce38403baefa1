"""What `dsv4 eval` measures and shows: how well a checkpoint predicts text, and whether it finds needles."""

import itertools
import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from dsv4_jax.command_line.terminal import Tables
from dsv4_jax.errors import ProblemsError
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.documents import BadRecord, DataError, matching_files
from dsv4_jax.training.evaluation import NeedleResult, needle_cases, needle_results, text_score
from dsv4_jax.training.record_files import TextFileRecords

if TYPE_CHECKING:
    from dsv4_jax.language_model import LanguageModel


def evaluate(
    model: "LanguageModel",
    files: Sequence[str],
    seq_len: int,
    batch_size: int,
    max_bytes: int,
    needles: Sequence[int],
    trials: int,
    seed: int,
) -> dict:
    """What `dsv4 eval` prints, as one JSON object: `text`, and `needles` if lengths are given.

    Args:
        model: with a tokenizer.
        files: paths and patterns of UTF-8 text; none: the validation part of Python's standard library.
        seq_len: of rows. batch_size: rows at a time. max_bytes: of text at most, whole files.
        needles: context lengths of the retrieval test. trials: cases of each length and depth. seed: of them.

    Raises:
        ProblemsError: no tokenizer, no text, or sizes that cannot be.
    """
    if model.tokenizer is None:
        raise ProblemsError("cannot evaluate", ["the checkpoint has no tokenizer.json"])
    texts = _texts(files, max_bytes)
    model_of = (model.network, model.parameters)
    score = text_score(*model_of, model.tokenizer, texts, seq_len, batch_size)
    result: dict = {
        "text": {
            "nats_per_token": score.nats / score.tokens,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "tokens": score.tokens,
            "bytes": score.num_bytes,
            "seq_len": seq_len,
        }
    }
    if needles:
        bos = model.config.bos_token_id
        cases = needle_cases(model.tokenizer, bos, "".join(texts), needles, trials=trials, seed=seed)
        result["needles"] = _by_place(needle_results(*model_of, cases))
    return result


def show(result: dict, as_json: bool) -> None:
    """Prints the result of `evaluate` on stdout."""
    if as_json:
        print(json.dumps(result))
        return
    text = result["text"]
    print(
        f"{text['bits_per_byte']:.3f} bits per byte, perplexity {text['perplexity']:.2f} "
        f"({text['tokens']} tokens, {text['bytes']} bytes, rows of {text['seq_len']})"
    )
    if "needles" not in result:
        return
    depths = sorted({cell["depth"] for cell in result["needles"]})
    table = Table("tokens", *(f"depth {depth:.0%}" for depth in depths), title="needles found")
    for length, cells in itertools.groupby(result["needles"], lambda cell: cell["length"]):
        table.add_row(f"{length}", *(f"{cell['found']:.0%} ({cell['nats']:.2f} nats)" for cell in cells))
    Tables().print(table)


def _texts(files: Sequence[str], max_bytes: int) -> list[str]:
    """Whole files, the first that do not fit into `max_bytes` and all after it left out."""
    if not files:
        texts = [document.text for document in gather_corpus().validation]
    else:
        records = TextFileRecords(matching_files(tuple(files)))
        found = [records.read(number) for number in range(len(records))]
        if bad := [str(text) for text in found if isinstance(text, BadRecord)]:
            raise DataError("cannot read the text", bad)
        texts = found
    sizes = itertools.accumulate(len(text.encode()) for text in texts)
    kept = [text for text, size in zip(texts, sizes, strict=True) if size <= max_bytes]
    if not kept:
        raise ProblemsError("cannot evaluate", [f"--max-bytes {max_bytes} holds no whole file"])
    return kept


def _by_place(results: Sequence[NeedleResult]) -> list[dict]:
    """Share found and mean nats for each length and depth, in that order."""

    def place(result: NeedleResult) -> tuple[int, float]:
        return result.length, result.depth

    cells = []
    for (length, depth), group in itertools.groupby(sorted(results, key=place), place):
        members = list(group)
        found = sum(member.found for member in members) / len(members)
        nats = statistics.fmean(member.nats for member in members)
        cells.append({"length": length, "depth": depth, "found": found, "nats": nats})
    return cells
