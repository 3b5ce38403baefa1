"""`gathered_attention` against its reference, that against torch; `merge`, `csa_attention`; compilers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from pallas_kernels.hybrid_attention import (
    csa_attention,
    gathered_attention,
    hybrid_attention,
    kernel_tpu_gathered,
    merge,
)
from pallas_kernels.hybrid_attention.tuning import (
    VMEM_LIMIT,
    GatherBlocks,
    GatherGeometry,
    choose_gather_blocks,
    gather_from,
)
from tests.kernels.ahead_of_time import CHIPS, compile_for
from tests.kernels.checks import STRICT, assert_close, errors

MOSAIC_CALL = export.DisabledSafetyCheck.custom_call("tpu_custom_call")
# A small block on purpose: the cases below have several chunks and ragged ends.
SMALL = GatherBlocks(chunk=16)

# float32: the same terms in another order, relative to the largest value of a result.
FLOAT32 = 1e-5
# bfloat16 (8 bits): probabilities and the result are rounded once, against exact inputs.
BFLOAT16 = 1e-2


def operands(*, batch, length, heads, entries, chosen, stack=0, width=16):
    """Random operands; lists have every length from 0 (query 0 of sequence 0) to K, with holes of -1."""
    rng = np.random.default_rng(length + entries)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    index = np.full((batch * length, chosen), -1)
    for i, own in enumerate(index):
        count = chosen if len(index) == 1 else min(chosen, entries) * i // (len(index) - 1)
        own[rng.permutation(chosen)[:count]] = rng.permutation(entries)[:count]
    o = {
        "q": 4 * normal(batch, length, heads, width),
        "entries": normal(*([stack] if stack else []), batch, entries, width),
        "index": index.reshape(batch, length, chosen).astype(np.int32),
    }
    if stack:
        o["repeat"] = np.int32(stack - 1)
    return {name: jnp.asarray(x) for name, x in o.items()}


CASES = {
    "one query": dict(batch=1, length=1, heads=2, entries=40, chosen=10),
    "one entry": dict(batch=1, length=3, heads=2, entries=2, chosen=1),
    "ragged chunks": dict(batch=1, length=5, heads=3, entries=300, chosen=37),
    "sequences": dict(batch=2, length=3, heads=2, entries=74, chosen=32),
    "stack": dict(batch=2, length=3, heads=2, entries=50, chosen=20, stack=3),
    "longer than the entries": dict(batch=1, length=4, heads=2, entries=10, chosen=17),
}


@functools.partial(jax.jit, static_argnames=("impl", "blocks", "interpret"))
def results(o, **options):
    return dict(zip(("o", "lse"), gathered_attention(**o, **options), strict=True))


@functools.cache
def expected(name):
    return results(operands(**CASES[name]), impl="reference")


def torch_results(o):
    """The same from lists of rows, one query at a time, in float64."""
    q, entries = (torch.tensor(np.asarray(o[n], np.float64)) for n in ("q", "entries"))
    if "repeat" in o:
        entries = entries[int(o["repeat"])]
    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for b, t in np.ndindex(q.shape[:2]):
        keys = entries[b, [s for s in o["index"][b, t].tolist() if s >= 0]]
        logits = q[b, t] @ keys.T / q.shape[-1] ** 0.5
        if len(keys):
            out[b, t] = torch.softmax(logits, dim=1) @ keys
            lse[b, t] = torch.logsumexp(logits, dim=1)
    return {"o": out.numpy(), "lse": lse.numpy()}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_torch(name):
    assert_close(expected(name), torch_results(operands(**CASES[name])), FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_reference(name):
    got = results(operands(**CASES[name]), blocks=SMALL, interpret=True)
    assert_close(got, expected(name), FLOAT32)


def test_published_widths_with_chosen_blocks():
    o = operands(batch=1, length=2, heads=4, entries=200, chosen=20, width=512)
    assert_close(results(o, interpret=True), results(o, impl="reference"), FLOAT32)


def test_bfloat16_stays_close_to_exact():
    """Rows come in pairs here, and half of every pair is somebody else's."""
    o = operands(**CASES["stack"])
    low = {n: o[n].astype(jnp.bfloat16) for n in ("q", "entries")}
    got = results(o | low, blocks=SMALL, interpret=True)
    assert got["o"].dtype == jnp.bfloat16 and got["lse"].dtype == jnp.float32
    exact = {n: x.astype(jnp.float32) for n, x in low.items()}
    assert_close(got, results(o | exact, impl="reference"), BFLOAT16)


def test_no_races_and_nothing_uninitialised(capfd):
    """The strict interpreter fills unwritten memory with NaN, copies at the wait, and watches for races.

    It cannot see a reference as words, which bfloat16 needs; the rest of that path is float32's.
    """
    o = operands(batch=1, length=3, heads=2, entries=30, chosen=20)
    got = results(o, blocks=SMALL, interpret=STRICT)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    assert_close(got, results(o, impl="reference"), FLOAT32)


@pytest.mark.parametrize("options", [dict(impl="reference"), dict(interpret=True)])
@pytest.mark.parametrize(("entries", "chosen"), [(6, 3), (0, 3), (6, 0)])
def test_a_query_that_sees_nothing(options, entries, chosen):
    o = {
        "q": jnp.ones((1, 2, 2, 16)),
        "entries": jnp.ones((1, entries, 16)),
        "index": jnp.full((1, 2, chosen), -1, jnp.int32),
    }
    got = results(o, **options)
    np.testing.assert_array_equal(got["o"], 0)
    np.testing.assert_array_equal(got["lse"], -np.inf)


def test_the_repeat_may_be_traced():
    o = operands(**CASES["stack"])
    run = functools.partial(
        gathered_attention, o["q"], o["entries"], o["index"], blocks=SMALL, interpret=True
    )
    _, (got, _) = jax.lax.scan(lambda r, _: (r + 1, run(repeat=r)), jnp.int32(0), length=3)
    assert_close({"o": got[2]}, {"o": expected("stack")["o"]}, FLOAT32)
    assert np.abs(got[2] - got[0]).max() > 0.1


def test_the_half_of_a_pair_matters(monkeypatch):
    """The comparison in bfloat16 is sharp: the other half of a pair moves every result."""
    right = kernel_tpu_gathered.chosen_rows
    monkeypatch.setattr(kernel_tpu_gathered, "chosen_rows", lambda words, index: right(words, index + 1))
    o = operands(**CASES["stack"] | {"chosen": 10})  # compiled for nobody else
    low = {n: o[n].astype(jnp.bfloat16) for n in ("q", "entries")}
    found = errors(results(o | low, blocks=SMALL, interpret=True), results(o, impl="reference"))
    assert min(found.values()) > 10 * BFLOAT16, found


# ---- joining parts -----------------------------------------------------------------------------------------


def csa_operands(*, batch=2, length=19, window=5, entries=40, chosen=12, stack=0):
    """Operands of `csa_attention`: some lists name entries outside lo .. hi, which must not be seen."""
    o = operands(batch=batch, length=length, heads=2, entries=entries, chosen=chosen, stack=stack)
    rng = np.random.default_rng(1)
    token = np.arange(length)
    limits = {"lo": np.where(token < 9, 0, 4), "hi": (token + 1) * entries // length}
    return o | {
        "line": jnp.asarray(rng.standard_normal((batch, window - 1 + length, 16)), jnp.float32),
        "position": jnp.asarray(np.tile(token, (batch, 1)), jnp.int32),
        "sink": jnp.asarray(rng.standard_normal(2), jnp.float32),
        **{name: jnp.asarray(np.tile(x, (batch, 1)), jnp.int32) for name, x in limits.items()},
    }


@pytest.mark.parametrize(("stack", "options"), [(0, dict(impl="reference")), (2, dict(interpret=True))])
def test_csa_is_the_joint_softmax(stack, options):
    """Window, sink and gathered entries, merged, are one softmax over all of them."""
    o = csa_operands(stack=stack)
    got = jax.jit(functools.partial(csa_attention, window=5, **options))(**o)
    joint = {n: x for n, x in o.items() if n not in ("index", "repeat")}
    if stack:
        joint["entries"] = o["entries"][o["repeat"]]
    joint["selected"] = (o["index"][..., None] == jnp.arange(40)).any(axis=2)
    want = jax.jit(functools.partial(hybrid_attention, window=5, impl="reference"))(**joint)
    names = ("o", "lse")
    assert_close(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), FLOAT32)


def test_merge_of_any_parts_is_the_whole():
    """In float64's eyes: uneven parts, one part alone, parts of very different weight, empty parts."""
    rng = np.random.default_rng(0)
    logits, values = 30 * rng.standard_normal((4, 3, 24)), rng.standard_normal((24, 8))

    def part(columns):
        weight = np.exp(logits[..., columns] - logits.max())
        total = weight.sum(axis=-1)
        o = weight @ values[columns] / total[..., None]
        return jnp.asarray(o, jnp.float32), jnp.asarray(np.log(total) + logits.max(), jnp.float32)

    want = dict(zip(("o", "lse"), part(np.arange(24)), strict=True))
    nothing = jnp.zeros((4, 3, 8)), jnp.full((4, 3), -jnp.inf)
    for cuts in ([], [5], [1, 2, 20]):
        parts = [part(columns) for columns in np.split(np.arange(24), cuts)]
        for extended in (parts, [nothing, *parts], [*parts, nothing, nothing]):
            assert_close(dict(zip(("o", "lse"), merge(extended), strict=True)), want, FLOAT32)


def test_merge_of_empty_parts_is_empty():
    nothing = jnp.zeros((3, 8), jnp.bfloat16), jnp.full((3,), -jnp.inf)
    o, lse = merge([nothing, nothing])
    assert o.dtype == jnp.bfloat16
    np.testing.assert_array_equal(o.astype(jnp.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)
    with pytest.raises(ValueError, match="at least one part"):
        merge([])


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "entries"])
def test_differentiation_is_refused(name):
    o = operands(**CASES["one entry"])
    with pytest.raises(TypeError, match="no gradient: train through hybrid_attention"):
        jax.grad(lambda x: gathered_attention(**o | {name: x}, impl="reference")[0].sum())(o[name])


def test_bad_arguments_are_named():
    o = operands(**CASES["ragged chunks"])
    with pytest.raises(ValueError, match=r"entries is bfloat16.*index is float32, must be int32"):
        gathered_attention(o["q"], o["entries"].astype(jnp.bfloat16), o["index"].astype(jnp.float32))
    with pytest.raises(ValueError, match=r"entries \(1, 300, 8\) must end in \(1, 'S', 16\)"):
        gathered_attention(o["q"], o["entries"][..., :8], o["index"])
    low = {n: o[n].astype(jnp.bfloat16) for n in ("q", "entries")}
    with pytest.raises(ValueError, match="S=299 must be even in bfloat16"):
        gathered_attention(low["q"], low["entries"][:, 1:], o["index"])
    with pytest.raises(ValueError, match="stack of entries and repeat must come together"):
        gathered_attention(**o, repeat=0)
    with pytest.raises(ValueError, match=r"must be \[B, T, H, Dh\]"):
        gathered_attention(o["q"][0], o["entries"], o["index"])
    with pytest.raises(ValueError, match="impl='xla'"):
        gathered_attention(**o, impl="xla")
    with pytest.raises(ValueError, match="chunk=24"):
        GatherBlocks(chunk=24)


# ---- sizes and compilers -----------------------------------------------------------------------------------

HEADS = {"flash": 64, "pro": 128}
TOP_K = {"flash": 512, "pro": 1024}
CONTEXTS = {"64K": 16384, "1M": 262144}  # entries


def full_size(model="flash", entries=16384):
    """Shapes of a prefill chunk of 2048 tokens, in a stack of two repeats."""
    shapes = {
        "q": ((1, 2048, HEADS[model], 512), jnp.bfloat16),
        "entries": ((2, 1, entries, 512), jnp.bfloat16),
        "index": ((1, 2048, TOP_K[model]), jnp.int32),
        "repeat": ((), jnp.int32),
    }
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes.values()]


def of_a_stack(q, entries, index, repeat):
    return gathered_attention(q, entries, index, repeat=repeat)


def compile_full_size(chip, shapes):
    """Compiles, and holds the program to its promise: the stack is not copied, and neither is one repeat."""
    program = compile_for(chip, of_a_stack, *shapes)
    copied = [
        line
        for line in program.as_text().splitlines()
        if " copy(" in line and f",{shapes[1].shape[2]},512]" in line
    ]
    assert not copied
    # What is left is lists of indices, a few times.
    assert program.memory_analysis().temp_size_in_bytes <= 4 * 4 * shapes[2].size


def test_lowers_to_mosaic():
    exported = export.export(jax.jit(of_a_stack), platforms=["tpu"], disabled_checks=[MOSAIC_CALL])
    assert "@tpu_custom_call" in exported(*full_size()).mlir_module()


def test_compiles_ahead_of_time():
    compile_full_size("v6e", full_size())


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time_everywhere(chip, model, context):
    compile_full_size(chip, full_size(model, CONTEXTS[context]))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("model", HEADS)
def test_chosen_blocks_fit(model, itemsize):
    sizes = dict(heads=HEADS[model], width=512, num_chosen=TOP_K[model], itemsize=itemsize)
    g = GatherGeometry(1, 2048, blocks=choose_gather_blocks(**sizes), **sizes)
    assert g.vmem_bytes() <= VMEM_LIMIT and g.num_keys == TOP_K[model]
    with pytest.raises(ValueError, match="num_chosen=65536"):
        choose_gather_blocks(**sizes | {"num_chosen": 2**16})


@pytest.mark.parametrize("model", HEADS)
def test_gathering_pays_for_long_contexts(model):
    sizes = dict(heads=HEADS[model], num_chosen=TOP_K[model], width=512, itemsize=2)
    switches = {size: gather_from(size=size, **sizes) for size in (2**12, 2**14, 2**16, 2**18)}
    assert switches == {2**12: 13864, 2**14: 16065, 2**16: 24870, 2**18: 60089}
    assert gather_from(size=2**16 + 1, **sizes) > 2**16 + 1  # no pairs
