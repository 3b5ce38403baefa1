"""What a training step keeps of its forward pass: with remat the streams between layers, MTP block too."""

import dataclasses

import pytest

from dsv4_jax.config import tiny
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from experiments import step_memory

LENGTHS = (256, 512)
# What is below the MTP block goes out in the difference.
ONE_LAYER = dataclasses.replace(tiny(4), attention_kinds=("window",), router_kinds=("hash",))


def kept_per_token(depth: int, remat: str) -> float:
    """Bytes a token that the forward pass of a small float32 model hands to the backward pass."""
    policy = Policy.of("float32", remat=remat)
    network = Network(dataclasses.replace(ONE_LAYER, num_nextn_predict_layers=depth), policy)
    short, long = (step_memory.kept_bytes(network, length) for length in LENGTHS)
    return (long - short) / (LENGTHS[1] - LENGTHS[0])


@pytest.mark.parametrize("remat", ["unit", "none"])
def test_the_mtp_block_is_recomputed_as_the_layers_are(remat):
    streams = 4 * ONE_LAYER.hc_mult * ONE_LAYER.hidden_size  # bytes a token between two layers
    added = kept_per_token(1, remat) - kept_per_token(0, remat)
    print(f"{remat}: {added:.0f} bytes a token for the MTP block; the streams have {streams}")
    if remat == "unit":
        assert streams <= added < 3 * streams
    else:
        assert added > 10 * streams
