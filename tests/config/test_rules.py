"""Every rule of `config.rules`: broken once, alone, and named in the message."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax import config, errors
from dsv4_jax.config import Yarn, rules

YARN = config.tiny().yarn

BROKEN = [
    ({"vocab_size": 0}, "vocab_size=0 must lie in 1"),
    ({"vocab_size": 2**31}, "vocab_size=2147483648 must lie in 1"),
    ({"hidden_size": True}, "hidden_size=True must be an integer"),
    ({"hidden_size": 64.0}, "hidden_size=64.0 must be an integer"),
    ({"q_lora_rank": "32"}, "q_lora_rank='32' must be an integer"),
    ({"head_dim": -32}, "head_dim=-32 must lie in 1"),
    ({"o_groups": 3}, "num_attention_heads=4 must be a multiple of o_groups=3"),
    ({"o_groups": 8}, "num_attention_heads=4 must be a multiple of o_groups=8"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
    ({"qk_rope_head_dim": 34, "index_head_dim": 64}, "must not exceed head_dim=32"),
    ({"qk_rope_head_dim": 32}, "must not exceed index_head_dim=16"),
    ({"index_head_dim": 24}, "index_head_dim=24 must be a power of two"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must not exceed n_routed_experts=8"),
    ({"csa_ratio": 0}, "csa_ratio=0 must lie in 1"),
    ({"hca_ratio": 0}, "hca_ratio=0 must lie in 1"),
    ({"sliding_window": 0}, "sliding_window=0 must lie in 1"),
    ({"index_topk": 0}, "index_topk=0 must lie in 1"),
    ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters=0 must lie in 1"),
    ({"hc_eps": 0.0}, "hc_eps=0.0 must be a finite number greater than 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a finite number greater than 0"),
    ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor=inf must be a finite"),
    ({"swiglu_limit": -1.0}, "swiglu_limit=-1.0 must be a finite number, 0 or greater"),
    ({"rope_theta": 1.0}, "rope_theta=1.0 must be a finite number greater than 1"),
    ({"compress_rope_theta": True}, "compress_rope_theta=True must be a finite number"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2 must be 0 or 1"),
    ({"num_nextn_predict_layers": True}, "num_nextn_predict_layers=True must be an integer"),
    ({"eos_token_id": 512}, "eos_token_id=512 must lie in the vocabulary, 0 .. 511"),
    ({"bos_token_id": -1}, "bos_token_id=-1 must lie in the vocabulary"),
    ({"bos_token_id": False}, "bos_token_id=False must be an integer or absent"),
    ({"attention_kinds": ()}, "attention_kinds=() must be a non-empty tuple"),
    ({"attention_kinds": ["csa"] * 7}, "must be a non-empty tuple"),
    ({"attention_kinds": ("csa",) * 6}, "attention_kinds names 6 layers but router_kinds names 7"),
    ({"attention_kinds": ("csa", "sparse") * 3 + ("hca",)}, "found 'sparse' (first at layer 1)"),
    ({"router_kinds": ("hash", ["learned"]) * 3 + ("hash",)}, "found ['learned'] (first at layer"),
    ({"yarn": None}, "yarn=None must be a Yarn"),
    ({"yarn": dataclasses.replace(YARN, factor=0.5)}, "factor=0.5 must be at least 1"),
    (
        {"yarn": dataclasses.replace(YARN, factor=float("inf"))},
        "factor=inf must be a finite number",
    ),
    (
        {"yarn": dataclasses.replace(YARN, beta_slow=64.0)},
        "must satisfy beta_fast >= beta_slow > 0",
    ),
    ({"yarn": dataclasses.replace(YARN, beta_slow=0)}, "must satisfy beta_fast >= beta_slow > 0"),
    (
        {"yarn": dataclasses.replace(YARN, original_max_position_embeddings=0)},
        "original_max_position_embeddings=0 must be an integer",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_one_broken_rule_is_one_problem(change, message):
    with pytest.raises(errors.ConfigError) as caught:
        dataclasses.replace(config.tiny(), **change)
    assert len(caught.value.problems) == 1, caught.value
    assert message in caught.value.problems[0]


def test_all_problems_are_reported_at_once():
    changes = {"o_groups": 3, "num_experts_per_tok": 9, "hc_eps": -1.0, "index_head_dim": 24}
    with pytest.raises(errors.ConfigError) as caught:
        dataclasses.replace(config.tiny(), **changes)
    assert len(caught.value.problems) == 4


def test_every_field_has_a_rule():
    # A new field without a rule would let any value through.
    for field in dataclasses.fields(config.ModelConfig):
        assert rules.field_problems({field.name: object()}), field.name


def test_relations_wait_for_sound_fields():
    # one mistake, one message: o_groups=0 must not also be reported as a failed division
    fields = {"num_attention_heads": 4, "o_groups": 0}
    assert len(rules.field_problems(fields)) == 1
    assert rules.field_problems({"num_attention_heads": 4}) == []


@pytest.mark.parametrize(
    "sound",
    [
        {"swiglu_limit": 0.0},  # no clamp
        {"swiglu_limit": 10},
        {"index_topk": 10**6},  # more than there are entries: everything is selected
        {"sliding_window": 1},
        {"csa_ratio": 1, "hca_ratio": 1},
        {"csa_ratio": 5, "hca_ratio": 3},
        {"hc_mult": 1},
        {"num_experts_per_tok": 8},
        {"o_groups": 4},
        {"qk_rope_head_dim": 16},
        {"bos_token_id": None, "eos_token_id": None},
        {"num_nextn_predict_layers": 0},
        {"yarn": Yarn(1, 1, 1, 1)},
        {"head_dim": 9, "hidden_size": 13, "moe_intermediate_size": 1, "q_lora_rank": 1},
    ],
)
def test_unusual_but_sound_configs_are_accepted(sound):
    dataclasses.replace(config.tiny(), **sound)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from([f.name for f in dataclasses.fields(config.ModelConfig)]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.tuples(inner),
        max_leaves=3,
    ),
)
def test_no_value_crashes_the_rules(name, value):
    problems = rules.field_problems({name: value})
    assert all(name in problem for problem in problems)


@pytest.mark.parametrize("preset", [config.v4_flash, config.v4_pro, config.tiny])
def test_presets_keep_the_rules(preset):
    assert rules.field_problems(vars(preset())) == []
