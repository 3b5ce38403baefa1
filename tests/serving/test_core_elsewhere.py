"""The engine with a cache in narrow formats, and over a mesh: the same promises."""

import numpy as np
import pytest

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from tests.models import compressed_kinds

SIZES = EngineSettings(
    max_length=32, num_slots=4, num_lanes=2, chunk=4, num_pages=16, num_states=16, state_interval=8
)
WIDE = {"head_dim": 128, "qk_rope_head_dim": 64, "index_head_dim": 128}  # whole groups of the narrow formats


def served(lm, prompts):
    """Tokens of each prompt, and how many prompt tokens were known."""
    core = EngineCore(lm, SIZES)
    numbers = [core.add(ids, Sampling(max_tokens=5, seed=7, ignore_eos=True)) for ids in prompts]
    tokens, cached = {number: [] for number in numbers}, dict.fromkeys(numbers, 0)
    while core.has_work:
        for number, output in core.step():
            tokens[number] += output.token_ids
            cached[number] += output.cached_tokens
    core.prefixes.check()
    return [tokens[number] for number in numbers], list(cached.values())


def prompts():
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 300, 13).tolist()
    every = [tuple(shared), (5,), (*shared, 8), (*shared, 9, 9, 9, 9)]
    return every * 2


@pytest.mark.parametrize(
    "policy, mesh, changes",
    [
        (Policy.of("float32", cache="fp8+mxfp4", numerics="qat"), None, WIDE),
        pytest.param(Policy.of("bfloat16", cache="fp8+fp8"), None, WIDE, marks=pytest.mark.slow),
        (Policy.of("float32"), "data=2,expert=2", {}),
    ],
)
def test_tokens_are_those_of_generate(policy, mesh, changes):
    config = compressed_kinds(initializer_range=0.3, **changes)
    rules = None if mesh is None else "decode"
    lm = LanguageModel.random(config, policy, mesh=mesh, rules=rules)
    got, cached = served(lm, prompts())
    one = lm if mesh is None else LanguageModel.random(config, policy)
    for ids, tokens in zip(prompts()[:4], got[:4], strict=True):
        wanted = one.generate([list(ids)], 5, temperature=1.0, seed=[7], stop_token_ids=())
        assert tokens == np.asarray(wanted)[0].tolist()
    assert got[4:] == got[:4]
    assert cached[4:] == [12, 0, 12, 16]
