"""`decode_attention`: reference against torch, both kernels against reference, mutations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels.decode_attention import (
    decode_attention,
    kernel_sparse_core,
    kernel_tpu,
    sparse_core,
    visibility,
)
from pallas_kernels.decode_attention.tuning import DecodeBlocks
from pallas_kernels.formats.entries import Fp8Entries
from pallas_kernels.formats.entry_rows import Fp8Rows
from tests.kernels.checks import STRICT, assert_close, errors

# Small blocks on purpose: the cases below span several groups and blocks, and ragged ends of both.
SMALL = DecodeBlocks(sequences=2, entries=128)
GATHER = DecodeBlocks(sequences=1, entries=128, gather=True)
FETCH = DecodeBlocks(sequences=2, entries=128, gather=True, ahead=sparse_core.attend)

# float32: the same terms in another order, relative to the largest value of a result.
FLOAT32 = 1e-5
# bfloat16 (8 bits): probabilities and the result are rounded once, against exact inputs.
BFLOAT16 = 1e-2

REPEATS, REPEAT = 3, 1


def fp8_entries(rng, *shape, width, rotary=16):
    """Random entries, all channels but the `rotary` last in fp8; padding of scales is anything."""
    still = width - rotary
    values = rng.standard_normal((*shape, still)).astype(np.float32)
    scales = rng.integers(124, 130, (*shape, 8)).astype(np.uint8)
    scales[..., still // 64 :] = 255
    return Fp8Entries(
        np.array(jnp.asarray(values, jnp.float8_e4m3fn)),
        scales,
        np.array(jnp.asarray(rng.standard_normal((*shape, rotary)), jnp.bfloat16)),
    )


def in_rows(entries):
    """The same as `Fp8Rows`, byte by byte; what no entry holds is anything."""
    values, scales, rotary = (np.asarray(part) for part in entries)
    each = [part.view(np.uint8) for part in (values, rotary, scales)]
    words = np.concatenate(each, axis=-1).view("<u4")
    row = (values.shape[-1] + rotary.shape[-1]) // 4
    words, rest = np.split(words, [row], axis=-1)
    together = row // rest.shape[-1]
    num_rows = -(-words.shape[2] // together // 8) * 8
    shared = np.full((*words.shape[:2], num_rows, row), 0xFFFFFFFF, np.uint32)
    for s in range(words.shape[2]):
        at, place = divmod(s, together)
        shared[:, :, at, place * rest.shape[-1] : (place + 1) * rest.shape[-1]] = rest[:, :, s]
    return Fp8Rows(words, shared, rotary.shape[-1])


def operands(
    *,
    last,
    length=1,
    heads=2,
    window=5,
    spare=0,
    entries=0,
    seen=None,
    chosen=0,
    width=16,
    fp8=False,
    fp8_ring=False,
    rows=False,
    rotary=16,
):
    """Random operands of one call; `last` are the positions of the newest tokens, -1 for padding rows.

    Rows that no position has been written to hold large numbers, entries beyond what is seen NaN.
    """
    rng = np.random.default_rng(length + entries + len(last))
    batch, slots = len(last), window - 1 + length + spare

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    position = np.array(last)[:, None] - np.arange(length)[::-1]
    position[np.array(last) < 0] = -1
    ring = normal(REPEATS, batch, slots, width)
    if fp8_ring:
        ring = fp8_entries(rng, REPEATS, batch, slots, width=width)
    for b, newest in enumerate(last):
        for part in ring if fp8_ring else [ring]:
            part[:, b, max(newest + 1, 0) :] = 150 if part.dtype == np.uint8 else 1e2
    o = {
        "q": 4 * normal(batch, length, heads, width),
        "ring": ring,
        "position": position.astype(np.int32),
        "sink": normal(heads),
        "repeat": np.int32(REPEAT),
    }
    if not entries:
        return jax.tree.map(jnp.asarray, o)
    shape = (REPEATS, batch, entries)
    o["entries"] = fp8_entries(rng, *shape, width=width, rotary=rotary) if fp8 else normal(*shape, width)
    if seen is not None:
        # The queries of one sequence see up to one entry less, each.
        o["hi"] = np.maximum(np.array(seen)[:, None] - np.arange(length)[::-1], 0).astype(np.int32)
        for b, count in enumerate(seen):
            for part in o["entries"] if fp8 else [o["entries"]]:
                part[:, b, count:] = 255 if part.dtype == np.uint8 else np.nan
    else:
        # Some lists are shorter than K, and one is empty.
        index = np.full((batch, length, chosen), -1)
        for b in range(batch):
            for t in range(length):
                count = (chosen * (b + t)) // (batch + length - 2) if batch + length > 2 else chosen
                index[b, t, rng.permutation(chosen)[:count]] = rng.permutation(entries)[:count]
        o["index"] = index.astype(np.int32)
        if rows:
            o["entries"] = in_rows(o["entries"])
    return jax.tree.map(jnp.asarray, o)


CASES = {
    "first token": dict(last=[0], spare=3),
    "window": dict(last=[0, 3, 4, 5, 6, 70, -1], spare=2),
    "drafts around the ring's end": dict(last=[2, 6, 7, 8, 9, 30], length=3, heads=3, spare=1),
    "window of one": dict(last=[0, 9, 11], length=2, window=1),
    "window longer than a tile": dict(last=[200, 141, 90], window=140, spare=7),
    "entries": dict(last=[50, 7, 90], entries=300, seen=[300, 0, 129]),
    "one block of entries": dict(last=[50, 7, 90, 3], length=2, entries=72, seen=[72, 0, 31, 1]),
    "drafts complete entries": dict(last=[50, 7, 90, 4, 2], length=3, entries=260, seen=[256, 1, 130, 0, 2]),
    "chosen": dict(last=[50, 7, 90], entries=300, chosen=21),
    "chosen by drafts": dict(last=[50, 7, 90, -1], length=3, heads=3, entries=258, chosen=40),
    "one chosen": dict(last=[50], entries=2, chosen=1),
    "chunks of chosen": dict(last=[50, 7, 90], length=2, entries=400, chosen=300),
    "fp8": dict(last=[50, 7, 90], length=2, entries=300, seen=[300, 0, 129], width=144, fp8=True),
    "chosen of fp8": dict(last=[50, 7], length=2, entries=200, chosen=21, width=80, fp8=True),
    "chosen of fp8 rows": dict(last=[50, 7], length=2, entries=200, chosen=21, width=80, fp8=True, rows=True),
    "published fp8 rows": dict(
        last=[50, 7], entries=60, chosen=16, width=512, fp8=True, rows=True, rotary=64
    ),
    "chunks of fp8 rows": dict(
        last=[50, 7, 90], entries=401, chosen=300, width=144, fp8=True, rows=True, fp8_ring=True
    ),
    "fp8 ring": dict(last=[0, 3, 4, 5, 70, -1], length=2, spare=3, width=144, fp8_ring=True),
    "long fp8 ring": dict(last=[200, 141, 90], window=140, spare=7, width=208, fp8_ring=True),
    "all in fp8": dict(
        last=[50, 7, 90], length=2, entries=300, seen=[300, 0, 129], width=144, fp8=True, fp8_ring=True
    ),
    "chosen beside an fp8 ring": dict(
        last=[50, 7], length=3, entries=200, chosen=21, width=80, fp8_ring=True
    ),
}
FETCHED = ["chosen", "chosen by drafts", "one chosen", "chunks of chosen", "chosen beside an fp8 ring"]
IN_ROWS = ["chosen of fp8 rows", "published fp8 rows", "chunks of fp8 rows"]
GATHERED = FETCHED + IN_ROWS


def call(o, window, **options):
    o = o | dict(window=window, **options)
    results = jax.jit(functools.partial(decode_attention, **options, window=window))
    del o["window"]
    for name in options:
        del o[name]
    return dict(zip(("o", "lse"), results(**o), strict=True))


@functools.cache
def expected(name):
    return call(operands(**CASES[name]), CASES[name].get("window", 5), impl="reference")


def run(name, **options):
    return call(operands(**CASES[name]), CASES[name].get("window", 5), **options)


def torch_results(name, window):
    """The same from lists of rows by position, one query at a time, in float64."""

    o = operands(**CASES[name])

    def decoded(x):
        if isinstance(x, Fp8Rows):
            x = operands(**CASES[name] | {"rows": False})["entries"]
        if not isinstance(x, Fp8Entries):
            return x
        values, scales, rotary = (np.asarray(part, np.float64) for part in x)
        groups = np.split(values, values.shape[-1] // 64, axis=-1)
        still = [group * 2 ** (scales[..., [g]] - 127) for g, group in enumerate(groups)]
        return np.concatenate([*still, rotary], axis=-1)

    floats = {n: decoded(o[n]) for n in ("q", "ring", "sink", "entries") if n in o}
    t = {n: torch.tensor(np.asarray(x, np.float64)) for n, x in floats.items()}
    batch, length, heads, width = t["q"].shape
    slots = t["ring"].shape[2]
    out = torch.zeros(batch, length, heads, width, dtype=torch.float64)
    lse = torch.zeros(batch, length, heads, dtype=torch.float64)
    for b in range(batch):
        for i in range(length):
            newest = int(o["position"][b, i])
            tokens = range(max(newest - window + 1, 0), newest + 1)
            keys = t["ring"][REPEAT, b, [p % slots for p in tokens]]
            if "entries" in o:
                picked = range(int(o["hi"][b, i])) if "hi" in o else o["index"][b, i].tolist()
                keys = torch.cat([keys, t["entries"][REPEAT, b, [s for s in picked if s >= 0]]])
            logits = torch.cat([t["q"][b, i] @ keys.T / width**0.5, t["sink"][:, None]], dim=1)
            out[b, i] = torch.softmax(logits, dim=1)[:, :-1] @ keys
            lse[b, i] = torch.logsumexp(logits, dim=1)
    return {"o": out.numpy(), "lse": lse.numpy()}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_torch(name):
    want = torch_results(name, CASES[name].get("window", 5))
    assert_close(expected(name), want, FLOAT32)


@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_ROWS])
def test_streaming_matches_reference(name):
    assert_close(run(name, blocks=SMALL, interpret=True), expected(name), FLOAT32)


# Strict interpretation, below, runs in chunks too.
LONG = {"chunks of chosen", "chunks of fp8 rows"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in GATHERED]
)
def test_gathering_matches_reference(name):
    assert_close(run(name, blocks=GATHER, interpret=True), expected(name), FLOAT32)


@pytest.mark.parametrize("name", FETCHED)
def test_fetching_ahead_matches_reference(name):
    """Copies of single rows stand for the SparseCore's indirect ones; all else is what is compiled."""
    assert_close(run(name, blocks=FETCH, interpret=True), expected(name), FLOAT32)


def test_published_widths_with_chosen_blocks():
    case = dict(last=[900, 30, -1], heads=8, window=128, width=512, entries=150, seen=[150, 1, 0])
    o = operands(**case)
    assert_close(call(o, 128, interpret=True), call(o, 128, impl="reference"), FLOAT32)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("drafts complete entries", SMALL), ("chosen by drafts", SMALL), ("chosen by drafts", GATHER)]
    + [("all in fp8", SMALL), ("chosen beside an fp8 ring", FETCH), ("chosen of fp8 rows", GATHER)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("chosen beside an fp8 ring", GATHER), ("chosen by drafts", FETCH)]
    ],
)
def test_bfloat16_stays_close_to_exact(name, blocks):
    o, window = operands(**CASES[name]), CASES[name].get("window", 5)
    rounded = [n for n in ("q", "ring", "entries") if n in o and isinstance(o[n], jax.Array)]
    low = {n: o[n].astype(jnp.bfloat16) for n in rounded}
    got = call(o | low, window, blocks=blocks, interpret=True)
    assert got["o"].dtype == jnp.bfloat16 and got["lse"].dtype == jnp.float32
    exact = {n: x.astype(jnp.float32) for n, x in low.items()}
    assert_close(got, call(o | exact, window, impl="reference"), BFLOAT16)


STRICT_CASES = {
    "streaming": (dict(last=[50, 7, 9], length=2, entries=200, seen=[200, 0, 3]), jnp.float32, SMALL),
    "masked": (dict(last=[50, 7], length=2, entries=200, chosen=20), jnp.bfloat16, SMALL),
    "fp8": (
        dict(last=[50, 7], length=2, entries=200, seen=[200, 3], width=80, fp8=True, fp8_ring=True),
        jnp.float32,
        SMALL,
    ),
    "gathering": (
        dict(last=[50, 7], length=2, entries=40, chosen=20, width=80, fp8_ring=True),
        jnp.float32,
        GATHER,
    ),
    "gathering fp8 rows": (
        dict(last=[50, 7], entries=40, chosen=20, width=80, fp8=True, rows=True, fp8_ring=True),
        jnp.float32,
        GATHER,
    ),
    "gathering in chunks": (dict(last=[50, 7, 90], entries=200, chosen=150), jnp.float32, GATHER),
    "fetching ahead": (
        dict(last=[50, 7], length=2, entries=40, chosen=20, width=80, fp8_ring=True),
        jnp.float32,
        FETCH,
    ),
}


@pytest.mark.parametrize("name", STRICT_CASES)
def test_no_races_and_nothing_uninitialised(capfd, name):
    """The strict interpreter fills unwritten memory with NaN, copies at the wait, and watches for races.

    It cannot see a reference as words, which gathering in bfloat16 does; the rest of that path is float32's.
    """
    case, dtype, blocks = STRICT_CASES[name]
    o = operands(**case)
    o |= {n: o[n].astype(dtype) for n in ("q", "ring", "entries") if isinstance(o[n], jax.Array)}
    got = call(o, 5, blocks=blocks, interpret=STRICT)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    assert_close(got, call(o, 5, impl="reference"), FLOAT32 if dtype == jnp.float32 else BFLOAT16)


@pytest.mark.parametrize("impl", ["pallas", "reference"])
def test_a_query_that_sees_nothing_returns_the_sink(impl):
    o = operands(last=[-1, 8], length=2, entries=20, seen=[0, 4])
    got = call(o, 5, impl=impl, **({"interpret": True} if impl == "pallas" else {}))
    np.testing.assert_array_equal(got["o"][0], 0)
    np.testing.assert_allclose(got["lse"][0], np.broadcast_to(o["sink"], (2, 2)), rtol=1e-6)


def test_padding_behind_the_last_token_may_count_on():
    """Two tokens and a padding query at the next position are the two tokens alone, in the same ring."""
    o = operands(last=[9, 30], length=2, spare=1)
    more = ((0, 0), (0, 1), (0, 0), (0, 0))
    padded = o | {
        "q": jnp.pad(o["q"], more),
        "position": jnp.concatenate([o["position"], o["position"][:, 1:] + 1], axis=1),
    }
    got = {name: x[:, :2] for name, x in call(padded, 5, blocks=SMALL, interpret=True).items()}
    assert_close(got, call(o, 5, impl="reference"), FLOAT32)


def test_the_repeat_may_be_traced():
    o = operands(**CASES["entries"])

    def every_repeat(repeat, o):
        return repeat + 1, decode_attention(**o | {"repeat": repeat}, window=5, blocks=SMALL, interpret=True)

    _, (got, _) = jax.lax.scan(lambda r, _: every_repeat(r, o), jnp.int32(0), length=REPEATS)
    assert_close({"o": got[REPEAT]}, {"o": expected("entries")["o"]}, FLOAT32)
    assert np.abs(got[REPEAT] - got[0]).max() > 0.1


def test_one_layer_needs_no_stack():
    o = operands(**CASES["entries"])
    alone = {n: x[REPEAT] if n in ("ring", "entries") else x for n, x in o.items() if n != "repeat"}
    assert_close(call(alone, 5, impl="reference"), expected("entries"), FLOAT32)
    with pytest.raises(ValueError, match=r"and ring \(1, 3, "):
        call({n: x for n, x in o.items() if n != "repeat"}, 5, impl="reference")


def test_chosen_mask_is_membership():
    rng = np.random.default_rng(0)
    index = np.stack([rng.permutation(700)[:90] for _ in range(6)]).reshape(2, 3, 90)
    index[0, 1, 5:] = -1
    mask = np.asarray(visibility.chosen_mask(jnp.asarray(index, jnp.int32), 700))
    for b, t in np.ndindex(2, 3):
        assert set(np.flatnonzero(mask[b, t])) == set(index[b, t]) - {-1}


def forget_the_ring_wraps(monkeypatch, o):
    views = visibility.views
    monkeypatch.setattr(
        visibility, "views", lambda position, hi, window, slots: views(position, hi, window, slots + 1)
    )
    return o


def shift_entries(monkeypatch, o):
    mask = visibility.entry_mask
    monkeypatch.setattr(
        visibility, "entry_mask", lambda view, first, count, chosen: mask(view, first + 1, count, chosen)
    )
    return o


def keep_unseen_rows(monkeypatch, o):
    monkeypatch.setattr(kernel_tpu, "clear_from", lambda ref, keep: None)
    return o


def drop_sink(monkeypatch, o):
    return o | {"sink": o["sink"] - 1e4}


@pytest.mark.parametrize("mutate", [forget_the_ring_wraps, shift_entries, keep_unseen_rows, drop_sink])
def test_mutations_are_caught(monkeypatch, mutate):
    """The comparisons above are sharp: a mask off by one, a missing sink or stale rows move the results."""
    o = mutate(monkeypatch, operands(**CASES["drafts complete entries"]))
    found = errors(call(o, 5, blocks=SMALL, interpret=True), expected("drafts complete entries"))
    assert found["o"] > 100 * FLOAT32, found


def test_differentiation_is_refused():
    o = operands(**CASES["window"])
    with pytest.raises(TypeError, match="no gradient: train through hybrid_attention"):
        jax.grad(lambda q: decode_attention(**o | {"q": q}, window=5, impl="reference")[0].sum())(o["q"])


def test_bad_arguments_are_named():
    o = operands(**CASES["chosen"])
    with pytest.raises(ValueError, match=r"sink \(3,\) must be \(2,\).*ring is bfloat16"):
        call(o | {"ring": o["ring"].astype(jnp.bfloat16), "sink": jnp.zeros(3)}, 5)
    with pytest.raises(ValueError, match="ring has 5 slots, needs window - 1 \\+ T = 6"):
        call(o, 6)
    with pytest.raises(ValueError, match="exactly one of hi and index"):
        call(o | {"hi": o["position"]}, 5)
    with pytest.raises(ValueError, match="hi and index need entries"):
        call({n: x for n, x in o.items() if n != "entries"}, 5)
    with pytest.raises(ValueError, match="impl='xla'"):
        call(o, 5, impl="xla")
    low = {n: o[n].astype(jnp.bfloat16) for n in ("q", "ring")}
    with pytest.raises(ValueError, match="S=299 to be a multiple of 2"):
        call(o | low | {"entries": o["entries"][:, :, 1:].astype(jnp.bfloat16)}, 5, blocks=GATHER)
    fp8 = operands(**CASES["chosen of fp8"])
    with pytest.raises(ValueError, match="reads fp8 entries in rows only"):
        call(fp8, 5, blocks=GATHER)
    rows = operands(**CASES["chosen of fp8 rows"])
    with pytest.raises(ValueError, match="entries in rows can only be gathered"):
        call(rows, 5, blocks=SMALL)
    with pytest.raises(ValueError, match="entries in rows are not fetched ahead"):
        call(rows, 5, blocks=FETCH)
    wrong = dataclasses.replace(rows["entries"], rest=rows["entries"].rest[:, :, 1:])
    with pytest.raises(ValueError, match=r"entries.rest .* must be \(3, 2, 72, 20\)"):
        call(rows | {"entries": wrong}, 5)
    wrong = dataclasses.replace(rows["entries"], num_rotary=6)
    with pytest.raises(ValueError, match="entries: 74 channels .* multiple of 64; entries: 6 rotated"):
        call(rows | {"entries": wrong}, 5)
    wrong = fp8["entries"]._replace(scales=fp8["entries"].scales[..., :0])
    with pytest.raises(ValueError, match=r"entries.scales .* must be \(3, 2, 200, 8\)"):
        call(fp8 | {"entries": wrong}, 5)
    ring = operands(**CASES["all in fp8"])
    wrong = ring["ring"]._replace(rotary=ring["ring"].rotary.astype(jnp.float32))
    with pytest.raises(ValueError, match="ring.rotary is float32, must be bfloat16"):
        call(ring | {"ring": wrong}, 5)
    with pytest.raises(ValueError, match="sequences=0 .*entries=100.*ahead needs gather"):
        DecodeBlocks(sequences=0, entries=100, ahead=sparse_core.attend)


@pytest.mark.parametrize(("rows", "strict"), [(1, False), (15, False), (48, False), (49, True), (200, True)])
def test_fetched_rows_are_those_listed(rows, strict, capfd):
    """Whole chunks for every subcore, a list that ends inside of one, and one that leaves subcores idle."""
    rng = np.random.default_rng(rows)
    table = rng.standard_normal((60, 8)).astype(np.float32)
    row = rng.integers(0, 60, rows).astype(np.int32)
    fetched = kernel_sparse_core.gather_rows(
        jnp.asarray(table), jnp.asarray(row), interpret=STRICT if strict else True
    )
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    np.testing.assert_array_equal(fetched[:rows], table[row])
    np.testing.assert_array_equal(fetched[rows:], np.broadcast_to(table[0], fetched[rows:].shape))


@pytest.mark.parametrize(("rows", "strict"), [(1, False), (47, False), (96, True), (131, True), (200, True)])
def test_fetched_halves_are_those_listed(rows, strict, capfd):
    """bfloat16 rows of pairs, paired anew. The strict interpreter gets words: it cannot see rows as words.

    Three subcores have a chunk of 16 rows each up to 48, two up to 96, three up to 144.
    """
    rng = np.random.default_rng(rows)
    bits = rng.integers(0, 2**16, (60, 8), np.uint16)
    row = rng.integers(0, 60, rows).astype(np.int32)
    table = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    if strict:
        table = jnp.asarray(bits[0::2] | bits[1::2].astype(np.uint32) << 16)
    words = kernel_sparse_core.gather_halves(table, jnp.asarray(row), interpret=STRICT if strict else True)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    halves = np.stack([words & 0xFFFF, np.asarray(words) >> 16], axis=1).reshape(-1, 8)
    np.testing.assert_array_equal(halves[:rows], bits[row])
    np.testing.assert_array_equal(halves[rows:], np.broadcast_to(bits[0], halves[rows:].shape))
