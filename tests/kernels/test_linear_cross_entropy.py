"""`linear_cross_entropy`: values, gradients, foreign ids, races, lowering, and compiling at V4's shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from pallas_kernels.chips import CHIPS
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import xla as cross_entropy_xla
from pallas_kernels.linear_cross_entropy.tuning import VMEM_BUDGET, LinearCrossEntropyBlocks, choose_blocks
from tests.kernels.ahead_of_time import compile_for
from tests.kernels.checks import STRICT, assert_close

# Small blocks on purpose: the cases below span several grid steps along both axes, with ragged tails.
SMALL = LinearCrossEntropyBlocks(tokens=128, vocab=128)
# Values: only the order of float32 sums differs. Gradients in bfloat16 are rounded once at the end; at
# precision "bfloat16" each number of the logits' gradient is rounded too, by up to 2^-9 of itself.
VALUE = 1e-5
GRADIENT = {"float32": 1e-5, "bfloat16": 1e-2}
VOCAB = 129_280
HIDDEN = {"flash": 4096, "pro": 7168}


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    width: int
    hidden_dtype: str = "float32"
    head_dtype: str = "float32"
    precision: str = "float32"

    def operands(self, seed=0):
        """(hidden, head, ids, cotangents of nll and lse); logits have a standard deviation of about 3."""
        rng = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
        hidden = (3 * draw(self.tokens, self.width)).astype(self.hidden_dtype)
        head = (draw(self.vocab, self.width) / self.width**0.5).astype(self.head_dtype)
        ids = jnp.asarray(rng.integers(0, self.vocab, self.tokens), jnp.int32)
        return hidden, head, ids, (draw(self.tokens), draw(self.tokens))

    @property
    def gradient_bound(self):
        return max(GRADIENT[self.hidden_dtype], GRADIENT[self.head_dtype], GRADIENT[self.precision])


CASES = [
    Case(1, 1, 1),
    Case(5, 7, 3),
    Case(128, 256, 128),  # nothing ragged
    Case(300, 513, 40),
    Case(129, 390, 1100, "bfloat16", "bfloat16"),  # two products of channels a gradient, the last ragged
    Case(257, 300, 72, "bfloat16", "float32"),
    Case(130, 300, 72, "float32", "bfloat16"),
    Case(257, 300, 72, "bfloat16", "bfloat16", "bfloat16"),
    Case(257, 300, 72, "float32", "float32", "bfloat16"),
]


@functools.partial(jax.jit, static_argnames=("precision", "impl", "blocks", "interpret"))
def run(hidden, head, ids, cotangents, **options):
    """((nll, lse), gradients of hidden and head)."""
    call = lambda hidden, head: linear_cross_entropy(hidden, head, ids, **options)  # noqa: E731
    values, pull = jax.vjp(call, hidden, head)
    return values, pull(cotangents)


@functools.partial(jax.jit, static_argnames=("impl", "blocks", "interpret"))
def values(hidden, head, ids, **options):
    return linear_cross_entropy(hidden, head, ids, **options)


def check(got, want, bound, case):
    """`bound` is that of the gradients, relative to the largest entry of each."""
    for name, (mine, theirs) in {
        "nll": (got[0][0], want[0][0]),
        "lse": (got[0][1], want[0][1]),
        "d_hidden": (got[1][0], want[1][0]),
        "d_head": (got[1][1], want[1][1]),
    }.items():
        assert mine.dtype == theirs.dtype, name
        if name.startswith("d_"):
            assert_close({f"{name} of {case}": mine}, {f"{name} of {case}": theirs}, bound)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=VALUE, atol=VALUE, err_msg=f"{name} of {case}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_matches_torch(case):
    hidden, head, ids, (d_nll, d_lse) = case.operands()
    to_torch = lambda a: torch.tensor(np.asarray(a, np.float64), requires_grad=True)  # noqa: E731
    leaves = to_torch(hidden), to_torch(head)
    x, w = (leaf.bfloat16().double() if case.precision == "bfloat16" else leaf for leaf in leaves)
    logits = torch.nn.functional.linear(x, w)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(ids)).long(), reduction="none")
    lse = torch.logsumexp(logits, dim=1)
    torch.autograd.backward((nll, lse), [torch.tensor(np.asarray(d, np.float64)) for d in (d_nll, d_lse)])

    got = run(hidden, head, ids, (d_nll, d_lse), precision=case.precision, impl="reference")
    np.testing.assert_allclose(got[0][0], nll.detach(), rtol=VALUE, atol=VALUE)
    np.testing.assert_allclose(got[0][1], lse.detach(), rtol=VALUE, atol=VALUE)
    for mine, leaf in zip(got[1], leaves, strict=True):
        assert_close(mine, leaf.grad.numpy(), case.gradient_bound)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    operands = case.operands()
    got = run(*operands, precision=case.precision, blocks=SMALL, interpret=True)
    check(got, run(*operands, precision=case.precision, impl="reference"), case.gradient_bound, case)


def test_bfloat16_gradients_are_rounded_once():
    """Nearly all are the rounded gradients of float32 arithmetic: only what lies next to a tie may differ."""
    hidden, head, *rest = Case(257, 300, 72, "bfloat16", "bfloat16").operands()
    got = run(hidden, head, *rest, blocks=SMALL, interpret=True)[1]
    want = run(hidden.astype(jnp.float32), head.astype(jnp.float32), *rest, impl="reference")[1]
    for mine, theirs in zip(got, want, strict=True):
        assert (mine != theirs.astype(jnp.bfloat16)).mean() < 0.01


@pytest.mark.parametrize("blocks", [(256, 128), (128, 256)], ids=str)
def test_blocks_need_not_be_square(blocks):
    case = Case(300, 513, 40)
    got = run(*case.operands(), blocks=LinearCrossEntropyBlocks(*blocks), interpret=True)
    check(got, run(*case.operands(), impl="reference"), case.gradient_bound, case)


@pytest.mark.parametrize("case", [Case(130, 260, 24), Case(130, 260, 24, "bfloat16", "bfloat16")], ids=str)
def test_no_races_and_nothing_uninitialised(case):
    """Two by three grid steps a kernel; what sticks out of the last blocks is NaN."""
    got = run(*case.operands(), blocks=SMALL, interpret=STRICT)
    check(got, run(*case.operands(), impl="reference"), case.gradient_bound, case)


def test_blocks_chosen_for_a_small_problem():
    case = Case(20, 30, 8)
    check(run(*case.operands(), interpret=True), run(*case.operands(), impl="reference"), 1e-5, case)


@pytest.mark.parametrize("impl", ["pallas", "reference"])
def test_foreign_ids_pick_a_logit_of_zero(impl):
    """Also ids that name rows of the last vocabulary block behind the end of the vocabulary."""
    case = Case(140, 300, 24)
    hidden, head, ids, cotangents = case.operands()
    foreign = np.resize([-1, 300, 301, 383, 2**31 - 1, -(2**31)], 140)
    is_foreign = np.arange(140) % 3 == 0
    ids = jnp.where(is_foreign, jnp.asarray(foreign, jnp.int32), ids)
    options = dict(blocks=SMALL, interpret=True) if impl == "pallas" else dict(impl=impl)
    (nll, lse), (d_hidden, _) = run(hidden, head, ids, cotangents, **options)
    np.testing.assert_array_equal(nll[is_foreign], lse[is_foreign])
    assert np.isfinite(nll).all()
    # Their gradient is that of lse, weighted with both cotangents.
    softmax = jax.nn.softmax(hidden @ head.T, axis=1)
    want = (cotangents[0] + cotangents[1])[:, None] * (softmax @ head)
    np.testing.assert_allclose(d_hidden[is_foreign], want[is_foreign], atol=1e-5)


def test_padding_of_weight_zero_leaves_no_trace():
    case = Case(140, 300, 24)
    hidden, head, ids, (d_nll, _) = case.operands()
    weight = jnp.where(jnp.arange(140) < 100, d_nll, 0)
    options = dict(blocks=SMALL, interpret=True)
    padded = run(hidden, head, ids.at[100:].set(-100), (weight, jnp.zeros(140)), **options)
    alone = run(hidden[:100], head, ids[:100], (weight[:100], jnp.zeros(100)), **options)
    assert not padded[1][0][100:].any()
    np.testing.assert_allclose(padded[1][0][:100], alone[1][0], atol=1e-6)
    np.testing.assert_allclose(padded[1][1], alone[1][1], atol=1e-5)


def test_a_split_vocabulary_combines():
    """The rule of the Sharding paragraph: foreign ids pick 0, so shares of nll and lse add up."""
    hidden, head, ids, _ = Case(140, 300, 24).operands()
    want = values(hidden, head, ids, impl="reference")
    options = dict(blocks=SMALL, interpret=True)
    shares = [values(hidden, head[a:b], ids - a, **options) for a, b in ((0, 110), (110, 300))]
    lse = jax.nn.logsumexp(jnp.stack([lse for _, lse in shares]), axis=0)
    nll = lse - sum(lse_i - nll_i for nll_i, lse_i in shares)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)
    np.testing.assert_allclose(nll, want[0], atol=2e-5)


def test_large_logits_do_not_overflow():
    hidden, head, ids, _ = Case(130, 300, 24).operands()
    got = values(hidden * 1000, head, ids, blocks=SMALL, interpret=True)
    want = values(hidden * 1000, head, ids, impl="reference")
    for mine, theirs in zip(got, want, strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-2)  # logits reach 10^4


def test_problems_are_named_together():
    with pytest.raises(ValueError, match=r"impl='cuda'.*precision='tf32'.*ids \(3,\).*ids float32") as error:
        linear_cross_entropy(jnp.ones((4, 8)), jnp.ones((9, 8)), jnp.ones(3), impl="cuda", precision="tf32")
    assert "head" not in str(error.value)
    with pytest.raises(ValueError, match="V=0 must be at least 1"):
        linear_cross_entropy(jnp.ones((4, 8)), jnp.ones((0, 8)), jnp.ones(4, jnp.int32))
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        linear_cross_entropy(jnp.ones((4, 8), jnp.float16), jnp.ones((9, 8)), jnp.ones(4, jnp.int32))
    with pytest.raises(ValueError, match="tokens=100"):
        LinearCrossEntropyBlocks(100, 128)


@pytest.mark.parametrize("kernel", ["forward", "d_hidden", "d_head"])
@pytest.mark.parametrize("width", HIDDEN.values())
@pytest.mark.parametrize("num_bytes", [2, 4])
def test_chosen_blocks_fit_every_chip(kernel, width, num_bytes):
    sizes = width, num_bytes, num_bytes, "float32"
    blocks = choose_blocks(kernel, 16384, VOCAB, *sizes)
    assert blocks.vmem_bytes(kernel, *sizes) <= VMEM_BUDGET
    assert min(chip.vmem_bytes for chip in CHIPS.values()) > VMEM_BUDGET
    with pytest.raises(ValueError, match="no legal block"):
        choose_blocks(kernel, 16384, VOCAB, *sizes, vmem_budget=2**20)


def values_and_gradients(precision, hidden, head, ids):
    """A program with all three kernels."""
    call = lambda *floats: linear_cross_entropy(*floats, ids, precision=precision)  # noqa: E731
    values, pull = jax.vjp(call, hidden, head)
    return values, pull(values)


def shapes(tokens, vocab, width, hidden_dtype, head_dtype):
    return (
        jax.ShapeDtypeStruct((tokens, width), hidden_dtype),
        jax.ShapeDtypeStruct((vocab, width), head_dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids="-".join
)
def test_lowers_to_mosaic(dtypes, precision):
    both = functools.partial(values_and_gradients, precision)
    for function, kernels in ((linear_cross_entropy, 1), (both, 3)):
        module = export.export(
            jax.jit(function),
            platforms=["tpu"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call("tpu_custom_call")],
        )(*shapes(300, 1000, 200, *dtypes)).mlir_module()
        assert module.count("stablehlo.custom_call @tpu_custom_call") == kernels


def compiles(chip, *sizes, precision="float32"):
    program = functools.partial(values_and_gradients, precision)
    compiled = compile_for(chip, program, *shapes(*sizes))
    # Rows of one number a token only: neither logits nor anything of size T D or V D is left in HBM.
    assert compiled.memory_analysis().temp_size_in_bytes <= 64 * sizes[0]


def test_compiles_for_v6e():
    compiles("v6e", 4096, VOCAB, HIDDEN["flash"], "bfloat16", "bfloat16")


def test_compiles_when_every_block_is_ragged():
    compiles("v6e", 700, 1000, 300, "bfloat16", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", HIDDEN)
@pytest.mark.parametrize(
    ("dtypes", "precision"),
    [
        (("bfloat16", "bfloat16"), "float32"),
        (("float32", "float32"), "float32"),
        (("bfloat16", "float32"), "bfloat16"),
    ],
    ids=["bf16", "f32", "rounded"],
)
def test_compiles_for_every_chip(chip, model, dtypes, precision):
    compiles(chip, 4000, VOCAB, HIDDEN[model], *dtypes, precision=precision)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_plain_xla_matches_the_reference_a_chunk_at_a_time(chunk):
    """Ids outside the rows of this part of a vocabulary pick a logit of 0."""
    case = Case(9, 11, 5, "bfloat16", "bfloat16")
    hidden, head, ids, cotangents = case.operands()
    ids = ids.at[::3].set(-2).at[1].set(11)

    def loss(operands, compute):
        found = compute(*operands, ids)
        return sum(jnp.vdot(a, b) for a, b in zip(found, cotangents, strict=True)), found

    def plain(hidden, head, ids):
        return linear_cross_entropy(hidden, head, ids, impl="reference")

    chunked = functools.partial(cross_entropy_xla.linear_cross_entropy_xla, chunk=chunk)
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, compute=compute), has_aux=True))((hidden, head))
        for compute in (chunked, plain)
    )
    assert_close(got[1], want[1], VALUE)
    assert got[0][1].dtype == jnp.bfloat16
    assert_close(got[0], want[0], case.gradient_bound)


def test_plain_xla_has_one_precision():
    with pytest.raises(ValueError, match="precision='bfloat16' is not computed by impl='xla'"):
        linear_cross_entropy(*Case(2, 3, 4).operands()[:3], precision="bfloat16", impl="xla")
