"""Compile-time promises: depth costs nothing to trace, and a decode step works on the cache in place."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.config import layer_stacks, tiny
from dsv4_jax.inference import steps
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy

pytestmark = pytest.mark.as_users_compile

POLICY = Policy.of("float32")


def abstract_decode(config, batch=2, max_length=512):
    cache = jax.eval_shape(lambda: new_cache(config, batch, max_length, POLICY.cache_dtype))
    logits = jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32)
    numbers = jax.ShapeDtypeStruct((batch,), jnp.float32)
    return (
        cache,
        logits,
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
        numbers,
        numbers,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
    )


def count_equations(jaxpr) -> int:
    inner = 0
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                inner += count_equations(getattr(value, "jaxpr", value))
    return len(jaxpr.eqns) + inner


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def traced_size(num_layers: int) -> int:
    config = tiny(num_layers)
    network = Network(config, POLICY)
    traced = jax.make_jaxpr(steps.decode.__wrapped__, static_argnums=0)(
        network, network.shapes(), *abstract_decode(config)
    )
    return count_equations(traced.jaxpr)


def test_depth_is_scanned():
    assert [(len(s.kinds), s.repeats) for s in layer_stacks(tiny(43))][-1] == (2, 20)


def test_tracing_does_not_grow_with_depth():
    shallow, deep = traced_size(11), traced_size(43)
    assert shallow > 500  # the count sees inside scans and conditionals
    assert deep == shallow


def test_decode_updates_the_cache_in_place():
    kinds, routers = ("window", *("hca", "csa") * 4), ("hash", *("learned",) * 8)
    config = tiny(9, attention_kinds=kinds, router_kinds=routers)
    assert [stack.repeats for stack in layer_stacks(config)] == [1, 4]
    network = Network(config, POLICY)
    args = abstract_decode(config, max_length=32768)
    memory = steps.decode.lower(network, network.shapes(), *args).compile().memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[0]))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4
