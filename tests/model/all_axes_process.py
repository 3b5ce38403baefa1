"""A model on 32 devices, no axis of size 1, beside the same on one; `test_all_axes.py` starts it."""

import jax
import numpy as np

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from tests.model import test_on_mesh as decoding
from tests.training import test_on_mesh as training

MESH = "data=2,fsdp=2,expert=2,tensor=2,context=2"
FLOAT32 = Policy.of("float32")


def gradients() -> None:
    """Losses, loads and gradients of packed rows, within the bounds of the smaller meshes."""
    wanted = training.losses_and_gradients(LanguageModel.random(training.CONFIG, FLOAT32), training.packed())
    spread = LanguageModel.random(training.CONFIG, FLOAT32, mesh=MESH, rules="train")
    training.compare(training.losses_and_gradients(spread, training.packed()), wanted)
    print("gradients agree", flush=True)


def tokens() -> None:
    """Greedy tokens of prompts of unequal lengths, fewer than devices, by the rules for decode."""
    prompts = [row[: 5 + 2 * number].tolist() for number, row in enumerate(decoding.TOKENS)]
    one, spread = (LanguageModel.random(decoding.CONFIG, FLOAT32, mesh=mesh) for mesh in (None, MESH))
    np.testing.assert_array_equal(spread.generate(prompts, 6), one.generate(prompts, 6))
    print("tokens agree", flush=True)


if __name__ == "__main__":
    assert len(jax.devices()) == 32
    gradients()
    tokens()
