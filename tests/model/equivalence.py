"""Ways of running one model over the same tokens that must agree, and the small models it is tried on."""

from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, settings

from dsv4_jax.config import ModelConfig
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.cache import Cache
from tests.models import all_kinds

TOLERANCE = 1e-5
"""On logits of size 1 to 4: the same float32 sums in another order."""

WIDTH = 40  # whole rows
CHUNK = 17  # longer than every ring of SMALL below
REWIND = 3

SMALL: ModelConfig = all_kinds(sliding_window=7, hca_ratio=6, index_topk=3)
BATCH = 3

# Section 16 of the specification: lengths around m, W and 2m for the released 4 / 128 / window 128.
REAL: ModelConfig = all_kinds(sliding_window=128, hca_ratio=128, index_topk=6)
AWKWARD_LENGTHS = (1, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 257)

QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Rows = Sequence[np.ndarray]


def random_rows(config_vocab: int, lengths: Sequence[int], seed: int) -> list[np.ndarray]:
    """One row of random ids per length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config_vocab, length) for length in lengths]


def padded(rows: Rows, width: int, vocab: int, seed: int = 99) -> np.ndarray:
    """int [B, width]: rows followed by random ids, which must not matter."""
    out = np.random.default_rng(seed).integers(0, vocab, (len(rows), width))
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def full(model: LanguageModel, rows: Rows, width: int) -> list[np.ndarray]:
    """One forward without a cache over padded rows -> logits [T_b, V] a row."""
    counts = np.array([len(row) for row in rows])
    logits = np.asarray(model.logits(padded(rows, width, model.config.vocab_size), counts))
    return [logits[b, :count] for b, count in enumerate(counts)]


def append(model: LanguageModel, cache: Cache, pieces: Rows, width: int) -> tuple[list[np.ndarray], Cache]:
    """Appends one piece a row in a call of `width` tokens -> logits of the real ones, new cache."""
    counts = np.array([len(piece) for piece in pieces])
    ids = padded(pieces, width, model.config.vocab_size, seed=int(counts.sum()))
    logits, cache = model.extend(cache, ids, counts)
    logits = np.asarray(logits)
    return [logits[b, :count] for b, count in enumerate(counts)], cache


def chunked(
    model: LanguageModel, rows: Rows, plan: Sequence[Sequence[int]], width: int, cache: Cache
) -> tuple[list[np.ndarray], Cache]:
    """Appends plan[i][b] tokens to row b in call i -> all logits a row."""
    done = [0] * len(rows)
    parts: list[list[np.ndarray]] = [[] for _ in rows]
    for counts in plan:
        pieces = [row[at : at + n] for row, at, n in zip(rows, done, counts, strict=True)]
        logits, cache = append(model, cache, pieces, width)
        for b, part in enumerate(logits):
            parts[b].append(part)
            done[b] += len(part)
    assert done == [len(row) for row in rows], "the plan must cover every row"
    return [np.concatenate(part) for part in parts], cache


def even_plan(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Every row takes `width` tokens a call until it is finished."""
    return [
        [min(width, max(length - start, 0)) for length in lengths] for start in range(0, max(lengths), width)
    ]


def largest_difference(got: Rows, want: Rows) -> float:
    """Over all rows; shapes must match."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)))
    return worst
