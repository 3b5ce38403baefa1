"""`hybrid_attention`: reference against torch, kernels against reference, gradients, mutations, compilers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from pallas_kernels.hybrid_attention import hybrid_attention, visibility
from pallas_kernels.hybrid_attention.tuning import VMEM_LIMIT, Geometry, HybridBlocks, choose_blocks
from tests.kernels.ahead_of_time import CHIPS, compile_for
from tests.kernels.checks import STRICT, assert_close, errors

MOSAIC_CALL = export.DisabledSafetyCheck.custom_call("tpu_custom_call")
# Small blocks on purpose: the cases below span several blocks of everything, chunks, and ragged tails.
SMALL = HybridBlocks(queries=16, entries=128, line=128, chunk=8)

# float32: the same terms in another order, relative to the largest value of a result.
FLOAT32 = 1e-5
# bfloat16 (8 bits): probabilities, their gradients and every result are rounded once, against exact inputs.
BFLOAT16 = 1e-2

FLOATS = ("q", "line", "sink", "entries")


def operands(
    *, batch, length, heads, window, entries=0, starts=(0,), seen="causal", selected=False, width=16
):
    """Random operands of one call; `starts` are where segments begin (-n: n tokens before the call)."""
    rng = np.random.default_rng(length + entries)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    token = np.arange(length)
    begin = np.max([np.where(token >= start, start, -(10**6)) for start in starts], axis=0)
    position = jnp.asarray(np.tile(token - begin, (batch, 1)), jnp.int32)
    o = {
        "q": 4 * normal(batch, length, heads, width),
        "line": normal(batch, window - 1 + length, width),
        "position": position,
        "sink": normal(heads),
    }
    if entries:
        done = np.minimum((token + 1) * entries // length, entries)
        lo, hi = {
            "causal": (0 * token, done),
            "nothing": (0 * token + 3, 0 * token + 3),
            "segments": (np.where(token < length // 2, 0, entries // 2), done),
            "late": (0 * token + entries - 5, 0 * token + entries),
        }[seen]
        o["entries"] = normal(batch, entries, width)
        o["lo"], o["hi"] = (jnp.asarray(np.tile(x, (batch, 1)), jnp.int32) for x in (lo, hi))
    if selected:
        o["selected"] = jnp.asarray(rng.random((batch, length, entries)) < 0.3)
    return o


# Sizes are compiled, what is visible is data. Blocks of queries and of entries are ragged at the end.
SHARED = dict(batch=2, length=37, heads=2, window=9, entries=300)
CASES = {
    "one token": dict(batch=1, length=1, heads=2, window=5, entries=3, starts=(-2,)),
    "window only": dict(batch=1, length=150, heads=2, window=9, starts=(-3, 40, 41, 50)),
    "window longer than the call": dict(batch=1, length=20, heads=3, window=140, starts=(-40, 11)),
    "window of one token": dict(batch=1, length=20, heads=2, window=1, entries=260, seen="late"),
    "causal entries": dict(**SHARED),
    "two segments": dict(**SHARED, starts=(0, 18), seen="segments"),
    "nothing visible": dict(**SHARED, seen="nothing"),
    "first blocks unseen": dict(**SHARED, seen="late"),
    "selected": dict(**SHARED, selected=True),
}


def floats(o):
    return {name: o[name] for name in FLOATS if name in o}


def run(o, window, **options):
    return hybrid_attention(**o, window=window, **options)


def cotangents(o):
    rng = np.random.default_rng(7)
    shapes = (o["q"].shape, o["q"].shape[:3])
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def program(window, **options):
    """A compiled function of operands and cotangents: o, lse and the gradients of every float operand."""

    @jax.jit
    def both(o, weights):
        results, pull = jax.vjp(lambda x: run(o | x, window, **options), floats(o))
        weights = tuple(w.astype(r.dtype) for w, r in zip(weights, results, strict=True))
        return {"o": results[0], "lse": results[1]} | pull(weights)[0]

    return both


shared_program = functools.cache(program)
"""Cases that differ in numbers only, such as what is visible, are traced and compiled once."""


def values_and_gradients(o, window, **options):
    """o, lse and the gradients of every float operand, through both results."""
    return shared_program(window, **options)(o, cotangents(o))


@functools.cache
def expected(name):
    case = CASES[name]
    return values_and_gradients(operands(**case), case["window"], impl="reference")


def torch_results(o, window):
    """The same from lists of keys, one query at a time, in float64."""
    t = {n: torch.tensor(np.asarray(x, np.float64), requires_grad=True) for n, x in floats(o).items()}
    position, lo, hi, selected = (
        np.asarray(o[n]) if n in o else None for n in ("position", "lo", "hi", "selected")
    )
    batch, length, heads, width = o["q"].shape
    outs, lses = [], []
    for b in range(batch):
        for i in range(length):
            # The segment's tokens up to this one, the last `window` of them at most.
            count = min(int(position[b, i]) + 1, window)
            keys = t["line"][b, [i + window - 1 - d for d in range(count)]]
            if "entries" in o:
                seen = [s for s in range(lo[b, i], hi[b, i]) if selected is None or selected[b, i, s]]
                keys = torch.cat([keys, t["entries"][b, seen]])
            logits = torch.cat([t["q"][b, i] @ keys.T / width**0.5, t["sink"][:, None]], dim=1)
            outs.append(torch.softmax(logits, dim=1)[:, :-1] @ keys)
            lses.append(torch.logsumexp(logits, dim=1))
    out = torch.stack(outs).reshape(batch, length, heads, width)
    lse = torch.stack(lses).reshape(batch, length, heads)
    weights = [torch.tensor(np.asarray(w, np.float64)) for w in cotangents(o)]
    ((out * weights[0]).sum() + (lse * weights[1]).sum()).backward()
    results = {"o": out, "lse": lse} | {
        n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in t.items()
    }
    return {name: x.detach().numpy() for name, x in results.items()}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_torch(name):
    case = CASES[name]
    assert_close(expected(name), torch_results(operands(**case), case["window"]), FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_reference(name):
    case = CASES[name]
    got = values_and_gradients(operands(**case), case["window"], blocks=SMALL, interpret=True)
    assert_close(got, expected(name), FLOAT32)


def test_published_widths_with_chosen_blocks():
    case = dict(batch=1, length=40, heads=8, window=128, entries=520, starts=(-60, 9), width=512)
    o = operands(**case)
    got = values_and_gradients(o, case["window"], interpret=True)
    assert_close(got, values_and_gradients(o, case["window"], impl="reference"), FLOAT32)


def test_bfloat16_stays_close_to_exact():
    case = CASES["two segments"]
    o = operands(**case)
    low = {name: o[name].astype(jnp.bfloat16) for name in ("q", "line", "entries")}
    exact = o | {name: x.astype(jnp.float32) for name, x in low.items()}
    got = values_and_gradients(o | low, case["window"], blocks=SMALL, interpret=True)
    assert got["o"].dtype == got["q"].dtype == got["entries"].dtype == jnp.bfloat16
    assert got["lse"].dtype == got["sink"].dtype == jnp.float32
    want = values_and_gradients(exact, case["window"], impl="reference")
    assert_close(got, want, BFLOAT16)


def test_no_races_and_nothing_uninitialised(capfd):
    """The strict interpreter fills unwritten memory and rows out of bounds with NaN and watches copies."""
    case = dict(batch=1, length=20, heads=2, window=9, entries=130, starts=(0, 7), selected=True)
    o = operands(**case)
    got = values_and_gradients(o, case["window"], blocks=SMALL, interpret=STRICT)
    assert_close(got, values_and_gradients(o, case["window"], impl="reference"), FLOAT32)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_unseen_blocks_are_not_touched():
    """NaN in a block of entries that nobody sees spoils nothing, because the block is skipped."""
    name = "first blocks unseen"
    o = operands(**CASES[name])
    spoilt = o | {"entries": o["entries"].at[:, : SMALL.entries].set(jnp.nan)}
    got = values_and_gradients(spoilt, CASES[name]["window"], blocks=SMALL, interpret=True)
    assert_close(got, expected(name), FLOAT32)


def shift_window(monkeypatch, o):
    right = visibility.window_bias
    monkeypatch.setattr(visibility, "window_bias", lambda view, offset, n: right(view, offset - 1, n))
    return o


def shift_entries(monkeypatch, o):
    right = visibility.entry_bias
    monkeypatch.setattr(
        visibility, "entry_bias", lambda view, first, n, chosen: right(view, first + 1, n, chosen)
    )
    return o


def drop_sink(monkeypatch, o):
    return o | {"sink": o["sink"] - 1e4}


@pytest.mark.parametrize("mutate", [shift_window, shift_entries, drop_sink])
def test_mutations_are_caught(monkeypatch, mutate):
    """The comparison above is sharp: a mask off by one or a missing sink moves every result."""
    case = CASES["two segments"]
    o = mutate(monkeypatch, operands(**case))
    got = program(case["window"], blocks=SMALL, interpret=True)(o, cotangents(o))  # traced anew
    found = errors(got, expected("two segments"))
    assert min(found.values()) > 100 * FLOAT32, found


def test_bad_arguments_are_named():
    o = operands(**CASES["selected"])
    with pytest.raises(ValueError, match=r"line is bfloat16.*sink \(3,\) must be \(2,\)"):
        run(o | {"line": o["line"].astype(jnp.bfloat16), "sink": jnp.zeros(3)}, 9)
    with pytest.raises(ValueError, match="entries and hi must come together"):
        run(o | {"hi": None}, 9)
    with pytest.raises(ValueError, match="impl='xla'"):
        run(o, 9, impl="xla")
    with pytest.raises(ValueError, match="queries=8"):
        HybridBlocks(queries=8, entries=128, line=128, chunk=8)
    with pytest.raises(ValueError, match="chunk=12"):
        HybridBlocks(queries=16, entries=128, line=128, chunk=12)


def full_size(heads, num_entries, *, masked=False, length=2048):
    """Shapes of a prefill chunk of 2048 tokens; one entry every 128 tokens (HCA) of the context, or none."""
    batch, width, window = 1, 512, 128
    shapes = {
        "q": ((batch, length, heads, width), jnp.bfloat16),
        "line": ((batch, window - 1 + length, width), jnp.bfloat16),
        "position": ((batch, length), jnp.int32),
        "sink": ((heads,), jnp.float32),
    }
    if num_entries:
        shapes["entries"] = ((batch, num_entries, width), jnp.bfloat16)
        shapes["lo"] = shapes["hi"] = ((batch, length), jnp.int32)
    if masked:
        shapes["selected"] = ((batch, length, num_entries), jnp.bool_)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def forward_and_backward(names, *arrays):
    o = dict(zip(names, arrays, strict=True))
    results, pull = jax.vjp(lambda x: run(o | x, 128), floats(o))
    return results, pull(jax.tree.map(jnp.ones_like, results))


def test_lowers_to_mosaic():
    shapes = full_size(64, 512, masked=True)
    program = jax.jit(functools.partial(forward_and_backward, tuple(shapes)))
    exported = export.export(program, platforms=["tpu"], disabled_checks=[MOSAIC_CALL])(*shapes.values())
    assert exported.mlir_module().count("@tpu_custom_call") >= 4  # forward, dq, d_line, d_entries


def compile_full_size(chip, shapes):
    compile_for(chip, functools.partial(forward_and_backward, tuple(shapes)), *shapes.values())


def test_compiles_ahead_of_time():
    compile_full_size("v6e", full_size(64, 64))


@pytest.mark.parametrize("length", [1, 37])
def test_odd_lengths_compile_ahead_of_time(length):
    """Shorter than a block, and a block with a ragged tail."""
    compile_full_size("v6e", full_size(64, 100, masked=True, length=length))


CONTEXTS = {"window": 0, "8K": 64, "64K": 512, "selected": 2048}


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time_everywhere(chip, heads, context):
    compile_full_size(chip, full_size(heads, CONTEXTS[context], masked=context == "selected"))


@pytest.mark.parametrize("heads", [64, 128])
def test_chosen_blocks_fit(heads):
    blocks = choose_blocks(heads=heads, width=512, window=128, itemsize=2, masked=True)
    g = Geometry(1, 2048, heads, 512, 128, 16384, 2, True, blocks)
    assert max(g.vmem_bytes().values()) <= VMEM_LIMIT
