"""A process among others that sums over all their devices for ever, until one is killed."""

import os
import signal
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sharding.host_values import put
from sharding.mesh import mesh_of
from sharding.processes import join, what_a_death_does


def main(port: int, number: int, victim: int) -> None:
    joined = join(f"127.0.0.1:{port}", 2, number, start_seconds=60)
    print(what_a_death_does(joined), file=sys.stderr, flush=True)
    mesh = mesh_of("data=8")
    x = put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, PartitionSpec("data")))
    total = jax.jit(lambda x: x + x.sum())
    for step in range(1_000_000):
        x = jax.block_until_ready(total(x) / 100)
        if number == victim and step == 10:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
