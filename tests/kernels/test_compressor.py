"""`compressor`: values, gradients, segments, races, lowering, and compiling at V4's shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from pallas_kernels.chips import CHIPS
from pallas_kernels.compressor import compressor
from pallas_kernels.compressor.tuning import VMEM_BUDGET, CompressorBlocks, choose_blocks
from tests.kernels.ahead_of_time import compile_for
from tests.kernels.checks import STRICT, assert_close

# Small blocks on purpose: most cases below span several grid steps with a ragged tail.
SMALL = CompressorBlocks(entries=8)
# Relative to the largest entry. float32: the order of sums. bfloat16: the pooled entry may round to its other
# neighbour before the result is rounded, and each gradient is rounded once.
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}
EPS = 1e-6
NAMES = ("entry", "d_kv", "d_gate", "d_ape", "d_norm")

# (m, w, Dc) of both models: CSA, its indexer, HCA.
COMPRESSORS = {"csa": (4, 2, 512), "indexer": (4, 2, 128), "hca": (128, 1, 512)}
# (B, T) of one device in training; the models differ in how many layers there are, not in these widths.
TOKENS = {"flash": (2, 4096), "pro": (1, 8192)}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    length: int
    ratio: int
    branches: int
    width: int = 128
    pairs: int = 32
    dtype: str = "float32"

    @property
    def num_entries(self):
        return self.length // self.ratio

    def operands(self, num_entries=None, seed=0):
        """((kv, gate, ape, norm, cos, sin), is_first, cotangent); about a fifth of the blocks come first."""
        rng = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
        rows = (self.batch, self.length, self.branches, self.width)
        entries = (self.batch, self.num_entries if num_entries is None else num_entries)
        angle = 10 * draw(*entries, self.pairs)
        inputs = (
            draw(*rows).astype(self.dtype),
            (2 * draw(*rows)).astype(self.dtype),
            draw(self.ratio, *rows[2:]),
            1 + 0.3 * draw(self.width),
            jnp.cos(angle),
            jnp.sin(angle),
        )
        is_first = jnp.asarray(rng.random(entries) < 0.2)
        return inputs, is_first, draw(*entries, self.width).astype(self.dtype)


CASES = [
    Case(1, 5, 4, 2, pairs=8),  # one entry and a row to spare
    Case(2, 83, 4, 2),  # 20 entries: three steps, the last half full, three rows to spare
    Case(1, 64, 4, 2, 256),  # nothing ragged
    Case(2, 83, 4, 2, 256, 64, "bfloat16"),
    Case(1, 37, 2, 2),
    Case(1, 90, 8, 2, pairs=1),
    Case(2, 90, 8, 1, 256),
    Case(1, 1300, 128, 1),  # 10 entries, 20 rows to spare
    Case(1, 1300, 128, 1, dtype="bfloat16"),
]


@functools.partial(jax.jit, static_argnames=("impl", "blocks", "interpret"))
def entries_of(inputs, **options):
    return compressor(*inputs, eps=EPS, **options)


@functools.partial(jax.jit, static_argnames=("impl", "blocks", "interpret"))
def run(inputs, is_first, cotangent, source=None, previous=None, **options):
    """(entry, d_kv, d_gate, d_ape, d_norm)."""
    options |= dict(is_first=is_first, source=source, previous=previous, eps=EPS)
    call = lambda *floats: compressor(*floats, *inputs[4:], **options)  # noqa: E731
    entry, pull = jax.vjp(call, *inputs[:4])
    return entry, *pull(cotangent)


def check(got, want, dtype):
    for name, mine, theirs in zip(NAMES, got, want, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert_close({name: mine}, {name: theirs}, BOUND[dtype])


def by_torch(case, inputs, is_first, cotangent):
    """Block by block in float64, rotating complex numbers; the same five results."""
    kv, gate, ape, norm, cos, sin = (torch.tensor(np.asarray(x, np.float64)) for x in inputs)
    leaves = [x.requires_grad_() for x in (kv, gate, ape, norm)]
    m, own, rows = case.ratio, case.branches - 1, []
    for b in range(case.batch):
        for s in range(case.num_entries):
            values, logits = kv[b, m * s : m * s + m, own], gate[b, m * s : m * s + m, own] + ape[:, own]
            if case.branches == 2 and s > 0 and not is_first[b, s]:
                before = slice(m * s - m, m * s)
                values = torch.cat([kv[b, before, 0], values])
                logits = torch.cat([gate[b, before, 0] + ape[:, 0], logits])
            entry = torch.einsum("jc,jc->c", torch.softmax(logits, 0), values)
            entry = torch.nn.functional.rms_norm(entry, entry.shape, norm, EPS)
            turn = torch.view_as_complex(entry[-2 * case.pairs :].reshape(-1, 2))
            turn = torch.view_as_real(turn * torch.complex(cos[b, s], sin[b, s])).reshape(-1)
            rows.append(torch.cat([entry[: -2 * case.pairs], turn]))
    entry = torch.stack(rows).reshape(case.batch, -1, case.width)
    entry.backward(torch.tensor(np.asarray(cotangent, np.float64)))
    return [x.detach().numpy() for x in (entry, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == "float32"], ids=str)
def test_reference_matches_torch(case):
    operands = case.operands()
    want = by_torch(case, *operands)
    for name, mine, theirs in zip(NAMES, run(*operands, impl="reference"), want, strict=True):
        assert_close({name: mine}, {name: theirs}, BOUND["float32"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    operands = case.operands()
    got = run(*operands, blocks=SMALL, interpret=True)
    check(got, run(*operands, impl="reference"), case.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla_matches_reference(case):
    operands = case.operands()
    check(run(*operands, impl="xla"), run(*operands, impl="reference"), case.dtype)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(
    "options", [dict(blocks=SMALL, interpret=True), dict(impl="xla"), dict(impl="reference")], ids=str
)
def test_a_segment_continued_gives_the_entries_of_the_whole(branches, options):
    """Blocks 3 .. 9, whose rows lie in any order, as in a ring; `previous` says what was before block 3."""
    case = Case(2, 40, 4, branches)
    inputs, is_first, cotangent = case.operands()
    cotangent = cotangent.at[:, :3].set(0)
    want = run(inputs, is_first, cotangent, impl="reference")
    token = np.random.default_rng(3).permutation(np.arange(8, 40))  # of each row that is held
    place = np.argsort(token).reshape(1, 8, 4).repeat(2, axis=0).astype(np.int32)
    held = (inputs[0][:, token], inputs[1][:, token], *inputs[2:4], *(x[:, 3:] for x in inputs[4:]))
    got = run(held, is_first[:, 3:], cotangent[:, 3:], place[:, 1:], place[:, :-1], **options)
    assert_close({"entry": got[0]}, {"entry": want[0][:, 3:]}, 1e-5)
    for name, mine, whole in zip(NAMES[1:3], got[1:3], want[1:3], strict=True):
        assert_close({name: mine}, {name: whole[:, token]}, 1e-5)
    for name, mine, whole in zip(NAMES[3:], got[3:], want[3:], strict=True):
        assert_close({name: mine}, {name: whole}, 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 45, 4, 2, 256),
        Case(2, 45, 4, 2, dtype="bfloat16"),
        Case(1, 75, 8, 1),
    ],
    ids=str,
)
def test_no_races_and_nothing_uninitialised(case):
    """Two grid steps a row and kernel; what sticks out of the last blocks is NaN."""
    operands = case.operands()
    got = run(*operands, blocks=SMALL, interpret=STRICT)
    check(got, run(*operands, impl="reference"), case.dtype)


@pytest.mark.parametrize("case", [Case(1, 83, 4, 2), Case(1, 300, 128, 1)], ids=str)
def test_blocks_chosen_by_default(case):
    operands = case.operands()
    check(run(*operands, interpret=True), run(*operands, impl="reference"), case.dtype)


def test_fewer_entries_than_complete_blocks():
    operands = Case(1, 83, 4, 2).operands(num_entries=11)
    got = run(*operands, blocks=SMALL, interpret=True)
    check(got, run(*operands, impl="reference"), "float32")
    assert got[1].shape == (1, 83, 2, 128) and not got[1][:, 44:].any()


@pytest.mark.parametrize("branches", [1, 2])
def test_packed_segments_equal_each_segment_alone(branches):
    """Segments of any length start where the one before ended; their blocks are found through `source`."""
    ratio, lengths = 4, (9, 3, 30, 4, 41, 7)
    case = Case(1, sum(lengths), ratio, branches)
    counts = [length // ratio for length in lengths]
    begins = np.cumsum((0, *lengths[:-1]))
    starts = np.concatenate([b + ratio * np.arange(c) for b, c in zip(begins, counts, strict=True)])
    starts = np.asarray([*starts, case.length - ratio])  # the last entry only fills the list
    source = jnp.asarray(starts[None, :, None] + np.arange(ratio), jnp.int32)
    is_first = np.concatenate([np.arange(c) == 0 for c in counts] + [[True]])[None]
    inputs, _, cotangent = case.operands(num_entries=source.shape[1])
    cotangent = cotangent.at[:, -1].set(0)

    packed = [
        run(inputs, jnp.asarray(is_first), cotangent, source, **options)
        for options in (dict(blocks=SMALL, interpret=True), dict(impl="reference"), dict(impl="xla"))
    ]
    check(*packed[:2], "float32")
    check(packed[2], packed[1], "float32")

    done = 0
    d_ape, d_norm = 0, 0
    for begin, length, count in zip(begins, lengths, counts, strict=True):
        if count == 0:
            assert not packed[0][1][0, begin : begin + length].any()
            continue
        rows, own = slice(begin, begin + length), slice(done, done + count)
        alone = (inputs[0][:, rows], inputs[1][:, rows], *inputs[2:4], inputs[4][:, own], inputs[5][:, own])
        want = by_torch(Case(1, length, ratio, branches), alone, np.zeros((1, count)), cotangent[:, own])
        assert_close(packed[0][0][:, own], want[0], 1e-5)
        assert_close(packed[0][1][:, rows], want[1], 1e-5)
        assert_close(packed[0][2][:, rows], want[2], 1e-5)
        d_ape, d_norm, done = d_ape + want[3], d_norm + want[4], done + count
    assert_close(packed[0][3], d_ape, 1e-5)
    assert_close(packed[0][4], d_norm, 1e-5)


@pytest.mark.parametrize("impl", ["pallas", "xla", "reference"])
def test_only_what_belongs_to_an_entry_is_read(impl):
    """NaN in the rows to spare, and in branch 0 of the last blocks of both segments."""
    case = Case(1, 83, 4, 2)
    inputs, _, _ = case.operands()
    is_first = jnp.arange(case.num_entries)[None] == 9
    kv, gate = inputs[:2]
    options = dict(blocks=SMALL, interpret=True) if impl == "pallas" else dict(impl=impl)
    want = entries_of(inputs, is_first=is_first, **options)
    spoil = lambda x: x.at[:, 80:].set(jnp.nan).at[:, 32:36, 0].set(jnp.nan).at[:, 76:80, 0].set(jnp.nan)  # noqa: E731
    got = entries_of((spoil(kv), spoil(gate), *inputs[2:]), is_first=is_first, **options)
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(got).all()


def test_large_gates_do_not_overflow():
    case = Case(1, 83, 4, 2)
    inputs, is_first, _ = case.operands()
    inputs = (inputs[0], 1000 * inputs[1], *inputs[2:])
    got = entries_of(inputs, is_first=is_first, blocks=SMALL, interpret=True)
    assert_close(got, entries_of(inputs, is_first=is_first, impl="reference"), 1e-5)


def test_problems_are_named_together():
    inputs, is_first, _ = Case(1, 40, 4, 2).operands()
    previous = jnp.zeros((1, 10, 3), jnp.int32)
    with pytest.raises(
        ValueError, match=r"impl='triton'.*eps=0.*gate .*is_first.*needs source.*previous must"
    ):
        how = {"is_first": is_first[:, 1:], "previous": previous, "eps": 0, "impl": "triton"}
        compressor(inputs[0], inputs[1][:, :3], *inputs[2:], **how)
    with pytest.raises(ValueError, match="3 and 3 axes"):
        compressor(*inputs[:2], inputs[2][0], *inputs[3:], eps=EPS)
    with pytest.raises(ValueError, match="P=10 entries must be within 0 .. 9 complete blocks"):
        compressor(inputs[0][:, :39], inputs[1][:, :39], *inputs[2:], eps=EPS)
    with pytest.raises(ValueError, match="both be bfloat16 or float32"):
        compressor(inputs[0].astype(jnp.bfloat16), *inputs[1:], eps=EPS)
    for case, message in (
        (Case(1, 40, 4, 2, 96), "Dc=96"),
        (Case(1, 40, 3, 1), "m=3"),
        (Case(1, 40, 24, 2), "m=24"),
        (Case(1, 40, 4, 1, 256, 65), "65 pairs"),
    ):
        inputs = case.operands()[0]
        with pytest.raises(ValueError, match=message):
            compressor(*inputs, eps=EPS)
        jax.eval_shape(
            functools.partial(compressor, eps=EPS, impl="reference"), *inputs
        )  # has no such limits
    with pytest.raises(ValueError, match="entries=12"):
        CompressorBlocks(12)


@pytest.mark.parametrize("sizes", COMPRESSORS.values(), ids=str)
@pytest.mark.parametrize("num_bytes", [2, 4])
@pytest.mark.parametrize("backward", [False, True])
def test_chosen_blocks_fit_every_chip(sizes, num_bytes, backward):
    blocks = choose_blocks(4096, *sizes, num_bytes, backward=backward)
    assert blocks.vmem_bytes(*sizes, num_bytes, backward=backward) <= VMEM_BUDGET
    assert min(chip.vmem_bytes for chip in CHIPS.values()) > VMEM_BUDGET
    with pytest.raises(ValueError, match="no legal block"):
        choose_blocks(4096, *sizes, num_bytes, backward=backward, vmem_budget=2**16)


def entry_and_gradients(*inputs):
    """A program with both kernels."""
    entry, pull = jax.vjp(lambda *floats: compressor(*floats, *inputs[4:], eps=EPS), *inputs[:4])
    return entry, pull(entry)


def shapes(batch, length, ratio, branches, width, dtype):
    rows = jax.ShapeDtypeStruct((batch, length, branches, width), dtype)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    angles = f32(batch, length // ratio, 32)
    return rows, rows, f32(ratio, branches, width), f32(width), angles, angles


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", COMPRESSORS.values(), ids=str)
def test_lowers_to_mosaic(sizes, dtype):
    for function, kernels in ((functools.partial(compressor, eps=EPS), 1), (entry_and_gradients, 2)):
        module = export.export(
            jax.jit(function),
            platforms=["tpu"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call("tpu_custom_call")],
        )(*shapes(2, 300, *sizes, dtype)).mlir_module()
        assert module.count("stablehlo.custom_call @tpu_custom_call") == kernels


def test_compiles_for_v6e():
    compile_for("v6e", entry_and_gradients, *shapes(*TOKENS["flash"], *COMPRESSORS["csa"], "bfloat16"))


@pytest.mark.parametrize(
    ("length", "sizes"), [(83, (4, 2, 256)), (5, (4, 2, 128)), (1300, (128, 1, 128))], ids=str
)
def test_compiles_when_blocks_are_ragged(length, sizes):
    compile_for("v6e", entry_and_gradients, *shapes(2, length, *sizes, "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", TOKENS)
@pytest.mark.parametrize("sizes", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles_for_every_chip(chip, model, sizes, dtype):
    compile_for(chip, entry_and_gradients, *shapes(*TOKENS[model], *sizes, dtype))
