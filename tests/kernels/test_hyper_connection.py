"""`hyper_connection`: values, gradients, ragged ends, races, Mosaic lowering, real shapes for real chips."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from pallas_kernels import hyper_connection
from pallas_kernels.hyper_connection import parts as parts_of
from pallas_kernels.hyper_connection import reference, stream_maps, tuning
from tests.kernels import hyper_connection_torch
from tests.kernels.ahead_of_time import CHIPS, compile_for
from tests.kernels.checks import STRICT, assert_close

V4 = dict(num_iters=20, hc_eps=1e-6, norm_eps=1e-6)
EPS = dict(hc_eps=1e-6, norm_eps=1e-6)
# Small blocks on purpose: several grid steps, several chunks of channels, a last block that sticks out.
SMALL = dict(blocks=tuning.HyperConnectionBlocks(tokens=16, channels=128))
INTERPRETED = SMALL | dict(interpret=True)
SETTINGS = {"pre": V4, "post": {}, "post_pre": V4, "collapse": EPS}
PUBLIC = {name: getattr(hyper_connection, name) for name in SETTINGS}


SUMS = {"else": 1e-5}  # float32: the same terms in another order


def operands(name, tokens, n, d, dtype=jnp.float32):
    """By name and in the order of the op's arguments."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    rows = n if name == "collapse" else 2 * n + n * n
    every = {
        "streams": normal(*tokens, n, d).astype(dtype),
        "update": normal(*tokens, d).astype(dtype),
        "maps": stream_maps.of_columns(normal(*tokens, rows), n) if name != "collapse" else None,
        "fn": normal(rows, n, d) / np.sqrt(d),
        "base": normal(rows),
        "scale": jnp.array([0.5, 0.7, 0.9][: 1 if name == "collapse" else 3]),
        "norm_weight": 1 + normal(d) / 4,
    }
    wanted = {
        "pre": ("streams", "fn", "base", "scale", "norm_weight"),
        "post": ("streams", "update", "maps"),
        "post_pre": tuple(every),
        "collapse": ("streams", "fn", "base", "scale"),
    }
    return {key: every[key] for key in wanted[name]}


def cotangents(outputs):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape, np.float32)).astype(a.dtype), outputs
    )


def value_and_gradients(name, arrays, **options):
    op = functools.partial(PUBLIC[name], **(SETTINGS[name] | options))

    def run(arrays):
        outputs, pullback = jax.vjp(lambda arrays: op(**arrays), arrays)
        return outputs, pullback(cotangents(outputs))[0]

    return jax.jit(run)(arrays)


def against_reference(name, tokens, n, d, *, bound, dtype=jnp.float32, options=INTERPRETED, **settings):
    arrays = operands(name, tokens, n, d, dtype)
    outputs, gradients = value_and_gradients(name, arrays, **options, **settings)
    want_outputs, want_gradients = value_and_gradients(name, arrays, impl="reference", **settings)
    chex.assert_trees_all_equal_shapes_and_dtypes((outputs, gradients), (want_outputs, want_gradients))
    assert_close(outputs, want_outputs, 1e-5 if dtype == jnp.float32 else 2**-7)
    for operand, gradient in want_gradients.items():
        assert_close(gradients[operand], gradient, bound.get(operand, bound["else"]))


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("n", [2, 4])
def test_reference_against_torch(n):
    arrays = operands("post_pre", (3,), n, 128)
    streams, x, maps = jax.jit(functools.partial(PUBLIC["post_pre"], **V4, impl="reference"))(**arrays)
    head = operands("collapse", (3,), n, 128)
    h = PUBLIC["collapse"](**head, **EPS, impl="reference")

    maps = stream_maps.columns(maps)
    arrays["maps"] = stream_maps.columns(arrays["maps"])
    given = {key: torch.from_numpy(np.array(a)).double() for key, a in arrays.items()}
    head = {key: torch.from_numpy(np.array(a)).double() for key, a in head.items()}
    for t in range(3):
        comb = given["maps"][t, 2 * n :].reshape(n, n)
        mixed = hyper_connection_torch.post(
            given["streams"][t], given["update"][t], given["maps"][t, n : 2 * n], comb
        )
        weights = [given[key] for key in ("fn", "base", "scale", "norm_weight")]
        want_x, *want_maps = hyper_connection_torch.pre(mixed, *weights, *V4.values())
        want_maps = torch.cat([part.reshape(-1) for part in want_maps])
        np.testing.assert_allclose(streams[t], mixed, rtol=0, atol=2e-5)
        np.testing.assert_allclose(maps[t], want_maps, rtol=0, atol=2e-6)
        np.testing.assert_allclose(x[t], want_x, rtol=0, atol=2e-5)
        weights = [head[key] for key in ("fn", "base", "scale")]
        want_h = hyper_connection_torch.collapse(head["streams"][t], *weights, *EPS.values())
        np.testing.assert_allclose(h[t], want_h, rtol=0, atol=2e-5)


def test_reference_sinkhorn_of_known_matrices():
    np.testing.assert_allclose(
        reference.sinkhorn_reference(jnp.zeros((4, 4)), 20, 1e-6), 0.24999975, rtol=0, atol=1e-7
    )
    logits = jnp.array([[2, 0.5, 1, 1.5], [2, 0, 0.5, 1], [1.5, 2, 0, 0.5], [1, 1.5, 2, 0]])
    want = [
        [0.290082, 0.103394, 0.204005, 0.402517],
        [0.402518, 0.087019, 0.171695, 0.338767],
        [0.204005, 0.537280, 0.087019, 0.171695],
        [0.103394, 0.272305, 0.537280, 0.087019],
    ]
    np.testing.assert_allclose(reference.sinkhorn_reference(logits, 20, 1e-6), want, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- kernels against the reference


def few_iterations(name):
    """The reference spells its iterations out, forward and backward. `pre` keeps the 20 of V4."""
    return {"num_iters": 4} if name == "post_pre" else {}


@pytest.mark.parametrize(
    ("name", "tokens", "n"),
    [
        ("post", (40,), 4),  # two whole blocks and a half
        ("post", (2, 9), 2),
        ("collapse", (2, 9), 4),
        ("pre", (21,), 2),
        ("post_pre", (40,), 3),
        pytest.param("post_pre", (1,), 4, marks=pytest.mark.slow),
        pytest.param("post_pre", (2, 3, 8), 4, marks=pytest.mark.slow),  # exactly three blocks
        pytest.param("pre", (33,), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_float32_values_and_gradients(name, tokens, n):
    against_reference(name, tokens, n, 256, bound=SUMS, **few_iterations(name))


# The reference rounds the gradients at every rounding of the forward pass, the kernel only its results; scale
# and base are sums of both signs over the tokens.
BFLOAT16_BOUND = {"scale": 0.05, "base": 0.02, "else": 0.01}


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("post_pre", 2),
        pytest.param("post_pre", 4, marks=pytest.mark.slow),
        pytest.param("pre", 4, marks=pytest.mark.slow),
        pytest.param("post", 4, marks=pytest.mark.slow),
        pytest.param("collapse", 4, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_values_and_gradients(name, n):
    how = few_iterations(name)
    against_reference(name, (21,), n, 256, bound=BFLOAT16_BOUND, dtype=jnp.bfloat16, **how)


def test_maps_of_bfloat16_streams_are_exact():
    """All three parts of `fn` count: with one alone the maps would be wrong in the third digit."""
    arrays = operands("pre", (21,), 2, 256, dtype=jnp.bfloat16)
    pre = jax.jit(functools.partial(PUBLIC["pre"], **V4), static_argnames=("impl", "interpret"))
    (_, got), (_, want) = pre(**arrays, interpret=True), pre(**arrays, impl="reference")
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


def test_kernels_keep_the_maps_of_a_token_in_a_line():
    """pre, post, comb row-major; what a kernel kept is what it gets back."""
    kept = jnp.arange(2 * 3 * 8, dtype=jnp.float32).reshape(2, 3, 8)
    maps = stream_maps.of_columns(kept, 2)
    assert [part.shape for part in maps] == [(2, 2, 3), (2, 2, 3), (2, 2, 2, 3)]
    token = [maps.pre[:, 1, 2], maps.post[:, 1, 2], maps.comb[0, :, 1, 2], maps.comb[1, :, 1, 2]]
    np.testing.assert_array_equal(np.concatenate(token), kept[1, 2])
    np.testing.assert_array_equal(stream_maps.columns(maps), kept)


def test_no_races_and_no_uninitialised_reads():
    # Few iterations: every access of a reference is a call back to Python here.
    options = SMALL | dict(interpret=STRICT)
    against_reference("post_pre", (21,), 2, 128, bound=SUMS, options=options, num_iters=2)


def test_three_bfloat16_parts_are_exact():
    value = jnp.asarray(np.random.default_rng(0).standard_normal((8, 128), np.float32))
    parts = parts_of.split(value)
    np.testing.assert_array_equal(parts[2] + parts[1] + parts[0], value)
    for part in parts:
        np.testing.assert_array_equal(part.astype(jnp.bfloat16).astype(jnp.float32), part)


# ---------------------------------------------------------------- contracts


def test_all_problems_are_named():
    arrays = operands("post_pre", (3,), 2, 100) | {"base": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"base float32\[3\].*num_iters=0.*D=100") as error:
        PUBLIC["post_pre"](**arrays, **(V4 | {"num_iters": 0}))
    assert str(error.value).startswith("post_pre: ")
    with pytest.raises(ValueError, match="impl='xla'"):
        PUBLIC["post"](**operands("post", (3,), 2, 128), impl="xla")


def test_blocks_are_legal_and_fit():
    for hidden in (128, 4096, 7168):
        for backward in (False, True):
            for num_tokens in (1, 64, 2048):
                shape = dict(streams=4, hidden=hidden, rows=24, itemsize=2, backward=backward)
                blocks = tuning.choose_blocks(num_tokens, **shape)
                assert hidden % blocks.channels == 0
                assert blocks.vmem_bytes(**shape) <= tuning.VMEM_BUDGET
    with pytest.raises(ValueError, match="multiple of 16"):
        tuning.HyperConnectionBlocks(24, 128)
    with pytest.raises(ValueError, match="multiple of 128"):
        tuning.HyperConnectionBlocks(16, 100)
    with pytest.raises(ValueError, match="no block fits"):
        tuning.choose_blocks(1, streams=4, hidden=2**20, rows=24, itemsize=2, backward=False)


# ---------------------------------------------------------------- TPU compilers


def shapes(name, num_tokens, hidden, dtype=jnp.bfloat16):
    arrays = jax.eval_shape(lambda: operands(name, (num_tokens,), 4, hidden, dtype))
    outputs = jax.eval_shape(functools.partial(PUBLIC[name], **SETTINGS[name], impl="reference"), **arrays)
    return arrays, outputs


def forward_and_backward(name, arrays):
    """A function of the operands and the gradients of the outputs, in a flat list."""
    shape = jax.tree.structure(arrays)

    def run(*flat):
        given = jax.tree.unflatten(shape, flat[: shape.num_leaves])
        outputs, pullback = jax.vjp(lambda given: PUBLIC[name](**given, **SETTINGS[name]), given)
        structure = jax.tree.structure(outputs)
        return outputs, pullback(jax.tree.unflatten(structure, flat[shape.num_leaves :]))

    return run


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", PUBLIC)
def test_lowers_to_mosaic(name, dtype):
    arrays, outputs = shapes(name, 40, 256, dtype)
    mosaic = export.DisabledSafetyCheck.custom_call("tpu_custom_call")
    lowered = export.export(
        jax.jit(forward_and_backward(name, arrays)), platforms=["tpu"], disabled_checks=[mosaic]
    )(*jax.tree.leaves((arrays, outputs)))
    text = lowered.mlir_module()
    assert text.count("tpu_custom_call") >= 2  # one kernel forward, one backward


def compile_both(chip, name, num_tokens, hidden, dtype=jnp.bfloat16):
    arrays, outputs = shapes(name, num_tokens, hidden, dtype)
    compile_for(chip, forward_and_backward(name, arrays), *jax.tree.leaves((arrays, outputs)))


def test_compiles_for_v6e_at_flash_size():
    compile_both("v6e", "post_pre", 64, 4096)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [64, 2048])
@pytest.mark.parametrize("hidden", [4096, 7168])
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_chip(chip, name, hidden, num_tokens):
    compile_both(chip, name, num_tokens, hidden)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 300])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_compiles_with_a_ragged_end(chip, dtype, num_tokens):
    compile_both(chip, "post_pre", num_tokens, 4096, dtype)
