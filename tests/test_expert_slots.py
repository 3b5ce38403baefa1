"""A model with copies of its hot experts serves like the one without; the fullest device has less."""

import jax
import numpy as np
import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.expert_slots import expert_loads, with_copies
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from sharding.expert_copies import place_copies
from tests.models import compressed_kinds
from tests.serving.test_core_elsewhere import prompts, served

CONFIG = compressed_kinds(
    initializer_range=0.3, attention_kinds=("csa", "hca"), n_routed_experts=16, num_nextn_predict_layers=0
)
FLOAT32 = Policy.of("float32")
MESH = "data=2,expert=4"


@pytest.fixture(scope="module")
def spread():
    return LanguageModel.random(CONFIG, FLOAT32, mesh=MESH, rules="decode")


def test_tokens_and_logits_are_the_same_and_hot_experts_are_served_by_several(spread):
    tokens = np.asarray([list(ids)[:12] + [1] * (12 - len(ids[:12])) for ids in prompts()], np.int32)
    num_valid = np.asarray([min(len(ids), 12) for ids in prompts()], np.int32)
    loads = expert_loads(spread, tokens, num_valid)
    assert (
        loads.shape == (2, 16) and (loads.sum(axis=1) == num_valid.sum() * CONFIG.num_experts_per_tok).all()
    )
    copied = with_copies(spread, loads, spare=2)
    gate_up = copied.parameters["stacks"][0]["blocks"][0]["ffn"]["experts"]["gate_up"]
    before = spread.parameters["stacks"][0]["blocks"][0]["ffn"]["experts"]["gate_up"]
    assert gate_up.shape[1] == 24 and gate_up.sharding == before.sharding
    for row in loads:
        table = place_copies(row, 4, 6)
        assert table.device_loads(row, 4).max() < row.reshape(4, -1).sum(axis=1).max()
    want, got = (jax.device_get(lm.logits(tokens, num_valid)) for lm in (spread, copied))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow  # two engines are compiled
def test_an_engine_answers_the_same(spread):
    loads = 100.0 / np.arange(1, 17)
    copied = with_copies(spread, np.stack([loads, loads[::-1]]), spare=2)
    assert served(copied, prompts()) == served(spread, prompts())


def test_what_is_refused(spread):
    loads = np.ones((2, 16))
    one = LanguageModel.random(CONFIG, FLOAT32)
    with pytest.raises(ProblemsError, match=r"(?s)no mesh.*loads \(3, 16\).*spare=0"):
        with_copies(one, np.ones((3, 16)), spare=0)
    copied = with_copies(spread, loads)
    with pytest.raises(ProblemsError, match="copies already"):
        with_copies(copied, loads)
    with pytest.raises(ValueError, match="finite and not negative"):
        with_copies(spread, -loads)


def test_a_model_with_copies_is_not_saved(spread, tmp_path):
    with pytest.raises(ValueError):
        with_copies(spread, np.ones((2, 16))).save(tmp_path / "copies")
    assert not (tmp_path / "copies").exists()
