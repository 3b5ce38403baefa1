"""The subcommand `dsv4 eval`."""

from typing import Annotated, Literal

import tyro

from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.command_line.start import AllowLinks, Checkpoint, CompilationCache, Json, Mesh, prepare


def evaluate(
    checkpoint: Checkpoint,
    files: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = (),
    seq_len: int = 4096,
    batch_size: int = 1,
    max_bytes: int = 1_000_000,
    needles: Annotated[tuple[int, ...], tyro.conf.arg(metavar="LENGTH")] = (),
    trials: int = 1,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    mesh: Mesh = None,
    allow_links: AllowLinks = None,
    as_json: Json = False,
    compilation_cache: CompilationCache = True,
) -> None:
    """Measure how well a model predicts text, and whether it finds needles in long contexts.

    examples:
      dsv4 eval quickstart --seq-len 256
      dsv4 eval DIRECTORY --files "books/*.txt" --needles 4096 65536

    Args:
        files: UTF-8 texts, paths or patterns; by default the validation part of Python's standard library.
        seq_len: tokens of context at most.
        batch_size: rows that are computed together.
        max_bytes: of text, whole files.
        needles: also hide a number in contexts of so many tokens, at five depths, and ask for it.
        trials: needles of each length and depth.
        seed: of the needles.
        dtype: of parameters and activations.
    """
    prepare(compilation_cache)
    from dsv4_jax import loading
    from dsv4_jax.command_line import hub, scores

    directory = hub.locate(checkpoint, weights=True, announce=note)
    model = loading.load(directory, dtype=dtype, allow_links=allow_links, mesh=mesh)
    result = scores.evaluate(model, files, seq_len, batch_size, max_bytes, needles, trials, seed)
    scores.show(result, as_json)
