"""The loss over a mesh and its gradients are those of one device, whatever the number of tokens."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy, weighted_cross_entropy
from sharding.activations import Placement
from sharding.cross_entropy import CrossEntropyOverMesh, received_bytes
from sharding.mesh import mesh_of
from sharding.rules import TRAIN


def one(*operands):
    return weighted_cross_entropy(*operands, impl="xla")


def terms(hidden, head, ids):
    return linear_cross_entropy(hidden, head, ids, impl="xla")


def over(mesh, head="by bytes"):
    return CrossEntropyOverMesh(one, terms, Placement(mesh_of(mesh), TRAIN), head)


def operands(tokens, vocab, width=8):
    rng = np.random.default_rng(tokens)
    hidden, head = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, width), (vocab, width))
    )
    ids = rng.integers(0, vocab, tokens).astype(np.int32)
    weights = jnp.asarray(rng.random(tokens) * (np.arange(tokens) % 3 > 0), jnp.float32)
    return 3 * hidden, head, ids, weights


@pytest.mark.parametrize(
    ("mesh", "head"),
    [
        ("data=2,fsdp=2,tensor=2", "gathered"),
        ("data=2,fsdp=2,tensor=2", "split"),
        ("expert=2,tensor=4", "split"),
        ("expert=4,context=2", "split"),  # nothing to split it over
        ("data=1", "by bytes"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 13, 16])
def test_loss_and_gradients(mesh, head, tokens):
    given = operands(tokens, 12)
    spread = over(mesh, head)
    assert bool(spread.shared_axes(tokens, 12, 8, 4)) == (head == "split" and "tensor" in mesh)
    wanted, pulled = jax.value_and_grad(one, (0, 1))(*given)
    got, found = jax.jit(jax.value_and_grad(spread, (0, 1)))(*given)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for a, b in zip(found, pulled, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.abs(b).max(), 1e-6))


@pytest.mark.parametrize("head", ["gathered", "split"])
def test_a_z_loss(head):
    given = (*operands(13, 12), jnp.float32(0.2))
    wanted, pulled = jax.value_and_grad(one, (0, 1), has_aux=True)(*given)
    got, found = jax.jit(jax.value_and_grad(over("fsdp=4,tensor=2", head), (0, 1), has_aux=True))(*given)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for a, b in zip(found, pulled, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


def test_a_vocabulary_that_does_not_divide_is_gathered():
    assert over("fsdp=4,tensor=2", "split").shared_axes(16, 11, 8, 4) == ()


def compiled(mesh, head, tokens, vocab, width):
    """The program of loss and gradients, of operands that lie where training has them."""
    spread = over(mesh, head)
    axes = ("data", "fsdp", "expert", "context")
    specs = ((axes,), ("tensor",), (axes,), (axes,))
    places = [jax.NamedSharding(spread.placement.mesh, jax.P(*spec)) for spec in specs]
    given = [
        jax.device_put(x, place) for x, place in zip(operands(tokens, vocab, width), places, strict=True)
    ]
    step = jax.jit(jax.value_and_grad(spread, (0, 1)), out_shardings=(None, tuple(places[:2])))
    return step.lower(*given).compile().as_text()


def collective_bytes(program):
    """Of the results of all collectives, float32."""
    lines = re.findall(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all)\(", program)
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(lines))
    return sum(4 * math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)


def test_a_head_that_stays_is_never_whole_on_a_device_and_less_is_sent():
    tokens, vocab, width = 32, 96, 8
    texts = {head: compiled("data=4,tensor=2", head, tokens, vocab, width) for head in ("gathered", "split")}
    assert f"f32[{vocab},{width}]" in texts["gathered"]
    assert f"f32[{vocab},{width}]" not in texts["split"]
    sent = {head: collective_bytes(text) for head, text in texts.items()}
    # Both sum the gradient of the head over the tokens' devices: half of it where the head stays.
    assert 0 < sent["split"] < 0.7 * sent["gathered"]


def test_the_way_with_fewer_bytes_is_chosen():
    flash = {"vocab": 129_280, "width": 4096, "itemsize": 2}
    few, many = 200_000, 300_000
    for tokens, less, more in ((few, "split", "gathered"), (many, "gathered", "split")):
        counted = [received_bytes(head, tokens, parts=8, **flash) for head in (less, more)]
        assert counted[0] < counted[1]
    # 4 devices a group of 2: 64 tokens are 32 a group, and 2 V = 24 are fewer.
    assert over("data=4,tensor=2").shared_axes(64, 12, 8, 4) == ()
    assert over("data=4,tensor=2").shared_axes(16, 96, 8, 4) == ("tensor",)
