"""What no result on a CPU could show: other backends round operands of products, and drop pairs of casts."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import merge_params, split_trainable
from dsv4_jax.training.step import forward_losses
from tests.models import all_kinds

CONFIG = all_kinds()


def equations(jaxpr, primitive):
    """Every use of a primitive in a program, those inside loops and branches too."""
    for equation in jaxpr.eqns:
        if equation.primitive is primitive:
            yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value), primitive)


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def widened_fp8(equation) -> bool:
    """Whether this cast could annul one to FP8: XLA drops the pair on a GPU, and the rounding with it."""
    dtype = equation.invars[0].aval.dtype
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits == 8


def rounded(equation) -> bool:
    """Whether an accelerator would round the float32 operands of this product."""
    precision = equation.params["precision"] or (None, None)
    exact = precision == (lax.Precision.HIGHEST,) * 2
    return any(operand.aval.dtype == jnp.float32 for operand in equation.invars) and not exact


def loss(network, parameters, batch):
    trained, fixed = split_trainable(parameters)

    def total(trained):
        return forward_losses(network.holding(merge_params(trained, fixed)), batch)[0].total()

    return jax.value_and_grad(total)(trained)


def appended(network, parameters, cache, tokens):
    span = spans.appended(tokens, cache.length, jnp.full(len(tokens), tokens.shape[1], jnp.int32))
    model = network.holding(parameters)
    forward = model(span, cache)
    return model.logits(model.hidden(forward.streams)), forward.cache


def assert_exact(traced):
    for primitive, wrong in ((lax.dot_general_p, rounded), (lax.convert_element_type_p, widened_fp8)):
        found = list(equations(traced.jaxpr, primitive))
        assert len(found) > 20
        culprits = [str(equation.source_info.traceback) for equation in found if wrong(equation)]
        assert not culprits, f"{len(culprits)} times {primitive}, first:\n{culprits[0]}"


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("cache", ["plain", "fp8+fp8", "fp8+mxfp4"])
def test_steps_over_a_cache(length, cache):
    policy = Policy.of("float32", cache=cache)
    network = Network(CONFIG, policy)
    state = jax.eval_shape(lambda: new_cache(CONFIG, 2, 4096, policy.cache_dtype, 8, policy.row_dtype, cache))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    assert_exact(jax.make_jaxpr(appended, static_argnums=0)(network, network.shapes(), state, tokens))


@pytest.mark.parametrize("numerics", ["reference", "qat"])
def test_losses_and_gradients(numerics):
    network = Network(CONFIG, Policy.of("float32", numerics))
    row = jax.ShapeDtypeStruct((2, 300), jnp.int32)
    assert_exact(jax.make_jaxpr(loss, static_argnums=0)(network, network.shapes(), Batch(row, row)))


def test_a_rounded_product_is_found():
    x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    looped = jax.make_jaxpr(lambda x: lax.fori_loop(0, 3, lambda _, y: y @ y, x))(x)
    assert [rounded(equation) for equation in equations(looped.jaxpr, lax.dot_general_p)] == [True]


def test_a_pair_of_casts_is_found():
    x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    there_and_back = jax.make_jaxpr(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32))(x)
    casts = equations(there_and_back.jaxpr, lax.convert_element_type_p)
    assert [widened_fp8(equation) for equation in casts] == [False, True]
