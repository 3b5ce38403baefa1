"""Penalties, biases, top-k and min-p against plain numpy, row by row."""

import jax
import numpy as np
import pytest

from dsv4_jax.inference.logit_rules import LogitRules, applied

V = 7
NEUTRAL = dict(presence=0.0, frequency=0.0, repetition=1.0, bias={}, output=(), prompt=(), top_k=0, min_p=0.0)
ROWS = [
    {},
    {"presence": 0.5, "output": (1, 1, 3)},
    {"frequency": -0.25, "output": (1, 1, 3)},
    {"repetition": 2.0, "output": (1,), "prompt": (2, 6)},
    {"bias": {0: -100.0, 5: 3.0}},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": V + 5},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 4, "min_p": 0.1, "presence": 1.0, "output": (0, 2)},
]


def rules(rows):
    """`LogitRules` of rows of plain settings."""
    rows = [NEUTRAL | row for row in rows]
    rules = jax.tree.map(np.array, LogitRules.neutral(len(rows), V))
    for b, row in enumerate(rows):
        for name in ("presence", "frequency", "repetition", "top_k", "min_p"):
            getattr(rules, name)[b] = row[name]
        for token, bias in row["bias"].items():
            rules.bias[b, token] = bias
        np.add.at(rules.counts[b], list(row["output"]), 1)
        rules.seen[b, list(row["prompt"])] = True
    return rules


def by_hand(logits, row, temperature):
    row = NEUTRAL | row
    z = logits.astype(np.float64)
    counts = np.bincount(np.array(row["output"], int), minlength=V)
    for token in {*row["output"], *row["prompt"]}:
        z[token] = z[token] / row["repetition"] if z[token] > 0 else z[token] * row["repetition"]
    z -= row["frequency"] * counts + row["presence"] * (counts > 0)
    for token, bias in row["bias"].items():
        z[token] += bias
    p = np.exp((z - z.max()) / max(temperature, 1e-5))
    keep = p >= row["min_p"] * p.max()
    if row["top_k"]:
        keep &= z >= np.sort(z)[::-1][min(row["top_k"], V) - 1]
    return np.where(keep, z, -np.inf)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_every_row_by_its_own_rules(temperature):
    logits = np.random.default_rng(0).normal(size=(len(ROWS), V)).astype(np.float32)
    heat = np.full(len(ROWS), temperature, np.float32)
    got = np.asarray(jax.jit(applied)(logits, rules(ROWS), heat))
    for row, settings in enumerate(ROWS):
        wanted = by_hand(logits[row], settings, temperature)
        np.testing.assert_array_equal(np.isinf(got[row]), np.isinf(wanted), str(settings))
        kept = np.isfinite(wanted)
        np.testing.assert_allclose(got[row][kept], wanted[kept], rtol=1e-5, atol=1e-6)


def test_neutral_rows_keep_their_bits_beside_others():
    logits = np.random.default_rng(1).normal(size=(3, V)).astype(np.float32)
    heat = np.ones(3, np.float32)
    got = np.asarray(applied(logits, rules([{}, {"top_k": 1, "presence": 1.0, "output": (1,)}, {}]), heat))
    np.testing.assert_array_equal(got[[0, 2]].view(np.int32), logits[[0, 2]].view(np.int32))
    assert np.isfinite(got[1]).sum() == 1


def test_counting():
    counted = LogitRules.neutral(3, V).counting(np.array([1, 1, V - 1]), np.array([True, False, True]))
    np.testing.assert_array_equal(np.asarray(counted.counts).sum(axis=1), [1, 0, 1])
    assert counted.counts[0, 1] == 1 and counted.counts[2, V - 1] == 1
