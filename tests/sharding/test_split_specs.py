"""Tables of what may be split become specs, and what runs split by them is what runs on one device."""

import os
import subprocess
import sys

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.block_matmul.op import SPLITS as MATMUL
from pallas_kernels.core_attention import Queries
from pallas_kernels.core_attention.op import SPLITS as CORE
from pallas_kernels.formats.blocks import Fp8Blocks
from pallas_kernels.hybrid_attention.op import SPLITS as HYBRID
from pallas_kernels.hyper_connection import StreamMaps
from pallas_kernels.hyper_connection.op import SPLITS as HYPER
from sharding.split_specs import partition_specs


def array(rank):
    return jnp.zeros((2,) * rank)


def test_letters_become_axes():
    operands = {"q": array(4), "line": array(3), "position": array(2), "sink": array(1), "entries": None}
    in_specs, out_specs = partition_specs(HYBRID["hybrid_attention"], {"B": "rows", "H": "heads"}, operands)
    assert in_specs == (P("rows", None, "heads"), P("rows"), P("rows"), P("heads"), P("rows"))
    assert out_specs == (P("rows", None, "heads"), P("rows", None, "heads"))


def test_leading_dims_and_groups():
    weight = {"x": array(2), "weight": Fp8Blocks(array(3), array(3)), "repeat": array(0)}
    got = partition_specs(MATMUL["block_matmul"], {"G": ("a", "b")}, weight)
    assert got == ((P(None, ("a", "b")), P(None, ("a", "b")), P()), P(None, ("a", "b")))
    one = weight | {"weight": Fp8Blocks(array(2), array(2))}
    assert partition_specs(MATMUL["block_matmul"], {"O": "a"}, one)[0][1] == P("a")
    maps = StreamMaps(array(3), array(3), array(4))
    streams = {"streams": array(4), "update": array(3), "maps": maps}
    of_maps = StreamMaps(P(None, "a"), P(None, "a"), P(None, None, "a"))
    assert partition_specs(HYPER["post"], {"tokens": "a"}, streams) == ((P("a"), P("a"), of_maps), P("a"))
    whole = {
        "streams": array(4),
        "fn": array(3),
        "base": array(1),
        "scale": array(1),
        "norm_weight": array(1),
    }
    assert partition_specs(HYPER["pre"], {"tokens": "a"}, whole)[1] == (P("a"), of_maps)


def test_a_tuple_of_arrays_has_a_tuple_of_specs():
    queries = Queries(array(4), array(2), None, None, None, None)
    in_specs, out = partition_specs(CORE["attend"], {"H": "a"}, {"queries": queries, "line": array(3)})
    assert in_specs[0].q == out == P(None, None, "a")
    assert in_specs[0].position == in_specs[0].index_q == in_specs[1] == P()


def test_errors_name_every_problem():
    with pytest.raises(
        ValueError, match=r"T must be whole .*; B H may be split; no argument has a dim X; .*q"
    ):
        partition_specs(HYBRID["hybrid_attention"], {"T": "a", "X": "b"}, {"q": array(3), "keys": array(1)})
    with pytest.raises(ValueError, match=r"q has 3 dims, but is \[B T H Dh\]; keys is not among"):
        partition_specs(HYBRID["hybrid_attention"], {}, {"q": array(3), "keys": array(1)})
    with pytest.raises(ValueError, match="I can be split only if the results are summed"):
        partition_specs(MATMUL["block_matmul"], {"I": "a"}, {"x": array(2)})


# A process of its own: the number of host devices is fixed when JAX starts.
ON_EIGHT_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels import compressor, hybrid_attention, hyper_connection
from pallas_kernels.compressor.op import SPLITS as COMPRESSOR
from pallas_kernels.formats.blocks import Fp8Blocks
from pallas_kernels.hybrid_attention.op import SPLITS as HYBRID
from pallas_kernels.hyper_connection.op import SPLITS as HYPER
from sharding.per_device import per_device
from sharding.split_specs import partition_specs

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)


def compare(function, splits, axes, operands):
    names = tuple(operands)
    call = lambda *arrays: function(**dict(zip(names, arrays)))
    split = per_device(call, mesh, *partition_specs(splits, axes, operands))
    whole = call(*operands.values())
    for got, want in zip(jax.tree.leaves(jax.jit(split)(*operands.values())), jax.tree.leaves(whole)):
        assert len(got.sharding.device_set) == 8 and not got.sharding.is_fully_replicated
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
        print("compared", got.shape)


position = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
limits = {"lo": 0 * position, "hi": position}
attention = {"q": draw(2, 6, 8, 16), "line": draw(2, 9, 16), "position": position, "sink": draw(8)}
attention |= {"entries": draw(2, 7, 16), **limits, "selected": jnp.asarray(rng.random((2, 6, 7)) < 0.5)}
run = functools.partial(hybrid_attention.hybrid_attention, window=4, impl="reference")
compare(run, HYBRID["hybrid_attention"], {"B": "data", "H": "model"}, attention)

blocks = {"kv": draw(8, 12, 2, 16), "gate": draw(8, 12, 2, 16), "ape": draw(4, 2, 16), "norm": draw(16)}
blocks |= {"cos": draw(8, 3, 4), "sin": draw(8, 3, 4)}
run = functools.partial(compressor.compressor, eps=1e-6, impl="xla")
compare(run, COMPRESSOR["compressor"], {"B": ("data", "model")}, blocks)

streams = {"streams": draw(8, 3, 4, 16), "fn": draw(24, 4, 16), "base": draw(24), "scale": draw(3)}
settings = {"num_iters": 2, "hc_eps": 1e-6, "norm_eps": 1e-6, "impl": "reference"}
run = functools.partial(hyper_connection.pre, **settings)
compare(run, HYPER["pre"], {"tokens": ("data", "model")}, streams | {"norm_weight": draw(16)})
"""


def test_eight_devices_compute_what_one_does():
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as other tests
    ran = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("compared") == 2 + 1 + 4
