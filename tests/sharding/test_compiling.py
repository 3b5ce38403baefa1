"""Steps that are compiled with the compiler's options for exchanges where there are TPUs, and only there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.activations import Placement
from sharding.compiling import compiled_step
from sharding.mesh import mesh_of
from sharding.rules import DECODE
from tests.kernels.ahead_of_time import compiled, devices


class Network(NamedTuple):
    placement: Placement | None


@compiled_step(static_argnums=0)
def exchange(network, x):
    """Two waves: rows are exchanged and multiplied."""
    if network.placement is None:
        return x @ x

    def move(own, whole):
        waves = jnp.split(own, 2)
        return sum(lax.all_to_all(wave, "expert", 1, 0, tiled=True) @ whole for wave in waves)

    specs = (jax.P("expert"), jax.P())
    mesh = network.placement.mesh
    return jax.shard_map(move, mesh=mesh, in_specs=specs, out_specs=jax.P("expert"))(x, x[: len(x) // 4])


def test_one_device_and_a_mesh_of_cpus():
    before = exchange._cache_size()
    x = jnp.arange(64.0).reshape(8, 8)
    for network in (Network(None), Network(Placement(mesh_of("expert=4"), DECODE))):
        for _ in range(2):
            got = exchange(network, x)
        assert got.shape == ((8, 8) if network.placement is None else (16, 8))
    assert (exchange(Network(None), x) == x @ x).all()
    assert exchange._cache_size() == before + 2
    assert exchange.__name__ == "exchange" and exchange.__doc__.startswith("Two waves")


def test_tpus_exchange_while_they_compute():
    mesh = mesh_of("expert=4", devices("v6e"))
    network = Network(Placement(mesh, DECODE))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("expert")))
    text = compiled(exchange.lower(network, x)).as_text()
    assert " all-to-all-start(" in text
    # The options of a user's own jit are the user's: those of a jit inside it would be refused.
    text = compiled(jax.jit(lambda x: exchange(network, x)).lower(x)).as_text()
    assert " all-to-all(" in text and " all-to-all-start(" not in text
