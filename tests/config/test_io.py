"""Reading and writing config.json in every family, and every way it can be wrong."""

import copy
import dataclasses
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax import config, errors
from dsv4_jax.config import io as config_io

CONFIGS = {
    "flash": config.v4_flash(),
    "pro": config.v4_pro(),
    "tiny": config.tiny(),
    "tiny_pro_43": config.tiny(43, like="pro"),
    "ratios_2_8": config.tiny(csa_ratio=2, hca_ratio=8),
    "equal_ratios": config.tiny(csa_ratio=4, hca_ratio=4),
    "swapped_ratios": config.tiny(csa_ratio=128, hca_ratio=4),
    "no_mtp_no_tokens": config.tiny(num_nextn_predict_layers=0, bos_token_id=None, eos_token_id=None),
    "hash_in_the_middle": config.tiny(4, router_kinds=("learned", "hash", "learned", "hash")),
    "window_only": config.tiny(4, attention_kinds=("window",) * 4),
    # 10 / 49 * 49 truncates to 9 in floating point
    "awkward_rotary": config.tiny(head_dim=49, qk_rope_head_dim=10),
}
WRITERS = {
    "official": config_io.official_config_dict,
    "transformers": config_io.transformers_config_dict,
}
OFFICIAL = config_io.official_config_dict(config.tiny())
TRANSFORMERS = config_io.transformers_config_dict(config.tiny())


def problems_of(raw: dict, **kwargs) -> tuple[str, ...]:
    with pytest.raises(errors.ConfigError) as caught:
        config_io.parse_config(raw, **kwargs)
    return caught.value.problems


def without(raw: dict, *names: str) -> dict:
    return {name: value for name, value in raw.items() if name not in names}


# round trips


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", WRITERS)
def test_round_trip_through_a_file(tmp_path, name, family):
    written = WRITERS[family](CONFIGS[name])
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert config_io.read_config(tmp_path) == CONFIGS[name]
    assert config_io.read_config(tmp_path / "config.json") == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_both_families_in_one_file_agree(name):
    both = config_io.transformers_config_dict(CONFIGS[name])
    both |= config_io.official_config_dict(CONFIGS[name])
    assert config_io.parse_config(both).config == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_accepts_what_we_write(tmp_path, name):
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    ours = CONFIGS[name]
    theirs = DeepseekV4Config(**config_io.transformers_config_dict(ours))
    assert theirs.qk_rope_head_dim == ours.qk_rope_head_dim
    assert theirs.compress_rates["heavily_compressed_attention"] == ours.hca_ratio
    assert theirs.rope_parameters["compress"]["attention_factor"] == 1.0
    assert theirs.layer_types == [config_io.LAYER_TYPES[kind] for kind in ours.attention_kinds]
    theirs.save_pretrained(tmp_path)
    assert config_io.read_config(tmp_path) == ours


@pytest.mark.parametrize("name", ["flash", "pro", "tiny", "no_mtp_no_tokens"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_reads_our_official_config_the_same_way(tmp_path, name):
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    official = config_io.official_config_dict(CONFIGS[name])
    DeepseekV4Config(**official).save_pretrained(tmp_path)
    assert config_io.read_config(tmp_path) == CONFIGS[name]


def test_official_keys_of_flash_and_pro():
    flash = config_io.official_config_dict(config.v4_flash())
    assert flash["compress_ratios"] == [0, 0] + [4, 128] * 20 + [4, 0]
    assert flash["num_hidden_layers"] == 43 and flash["num_hash_layers"] == 3
    assert flash["rope_scaling"] == {
        "type": "yarn",
        "factor": 16.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 65536,
    }
    assert "layer_types" not in flash and "compress_rates" not in flash
    pro = config_io.official_config_dict(config.v4_pro())
    assert pro["compress_ratios"] == [128, 128] + [4, 128] * 29 + [4, 0]
    assert pro["index_topk"] == 1024 and len(pro["compress_ratios"]) == 62


def test_inference_names():
    flash = config.v4_flash()
    inference = {
        "vocab_size": 129280,
        "dim": 4096,
        "moe_inter_dim": 2048,
        "n_layers": 43,
        "n_hash_layers": 3,
        "n_heads": 64,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_activated_experts": 6,
        "score_func": "sqrtsoftplus",
        "route_scale": 1.5,
        "swiglu_limit": 10.0,
        "q_lora_rank": 1024,
        "head_dim": 512,
        "rope_head_dim": 64,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "window_size": 128,
        "original_seq_len": 65536,
        "rope_theta": 10000,
        "rope_factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "compress_rope_theta": 160000,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "dtype": "fp8",
    }
    expected = dataclasses.replace(flash, bos_token_id=None, eos_token_id=None)
    assert config_io.parse_config(inference).config == expected
    assert problems_of(without(inference, "rope_factor", "original_seq_len"))
    assert problems_of(without(inference, "compress_ratios"))
    assert config_io.parse_config(inference | {"n_mtp_layers": 0, "norm_eps": 1e-5}).config == (
        dataclasses.replace(expected, num_nextn_predict_layers=0, rms_norm_eps=1e-5)
    )


@settings(max_examples=60, deadline=None)
@given(head_dim=st.integers(2, 600), data=st.data())
def test_rotary_width_survives_the_partial_factor(head_dim, data):
    rotary = 2 * data.draw(st.integers(1, head_dim // 2))
    ours = config.tiny(head_dim=head_dim, qk_rope_head_dim=rotary, index_head_dim=1024)
    written = config_io.transformers_config_dict(ours)
    assert int(head_dim * written["partial_rotary_factor"]) == rotary  # as transformers computes it
    assert config_io.parse_config(without(written, "qk_rope_head_dim")).config == ours


# spellings


def test_rope_may_be_nested_or_flat():
    nested = without(TRANSFORMERS, "rope_theta", "compress_rope_theta")
    assert config_io.parse_config(nested).config == config.tiny()
    scaling = OFFICIAL["rope_scaling"]
    flat = without(OFFICIAL, "rope_scaling") | {"rope_parameters": scaling | {"rope_theta": 10000}}
    assert config_io.parse_config(flat).config == config.tiny()
    for stated in (None, 1.0, 1):
        extra = {"rope_scaling": scaling | {"attention_factor": stated}}
        assert config_io.parse_config(OFFICIAL | extra).config == config.tiny()


def test_legacy_rates_and_aliases():
    ours = config.tiny(csa_ratio=2, hca_ratio=8)
    raw = config_io.transformers_config_dict(ours)
    rates = {"compress_rate_csa": 2, "compress_rate_hca": 8}
    legacy = without(raw, "compress_rates", "n_routed_experts", "moe_intermediate_size") | rates
    legacy |= {"num_local_experts": 8, "intermediate_size": 32}
    assert config_io.parse_config(legacy).config == ours
    assert config_io.parse_config(raw | rates).config == ours
    assert "compress_rate_csa=4" in problems_of(raw | {"compress_rate_csa": 4})[0]


def test_compress_rates_define_custom_ratios():
    ratios = [8 if ratio == 128 else ratio // 2 for ratio in OFFICIAL["compress_ratios"]]
    custom = OFFICIAL | {"compress_ratios": ratios}
    found = problems_of(custom)
    assert any("compress_ratios[2]=2 does not name one layer kind" in problem for problem in found)
    assert any("compress_ratios[3]=8 does not name one layer kind" in problem for problem in found)
    rates = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8}
    read = config_io.parse_config(custom | {"compress_rates": rates}).config
    assert read == config.tiny(csa_ratio=2, hca_ratio=8)
    assert problems_of(OFFICIAL | {"compress_rates": {"sliding": 4}})


def test_draft_entries_beyond_the_layers():
    assert config_io.parse_config(OFFICIAL).config.num_nextn_predict_layers == 1
    three = OFFICIAL | {"compress_ratios": OFFICIAL["compress_ratios"] + [0, 0]}
    assert config_io.parse_config(three).config == config.tiny()
    none = OFFICIAL | {"compress_ratios": OFFICIAL["compress_ratios"][:7]}
    assert config_io.parse_config(none).config == config.tiny()
    wrong = OFFICIAL | {"compress_ratios": OFFICIAL["compress_ratios"] + [4]}
    assert "must be 0; found [4]" in problems_of(wrong)[0]


DSPARK = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 500,
    "dspark_target_layer_ids": [4, 5, 6],
    "dspark_markov_rank": 8,
}


@pytest.mark.parametrize("stated", [1, 3])
def test_dspark_head_is_read_and_never_taken_for_mtp(stated):
    raw = OFFICIAL | DSPARK | {"num_nextn_predict_layers": stated}
    raw["compress_ratios"] = raw["compress_ratios"] + [0, 0]
    read = config_io.parse_config(raw)
    assert read.has_dspark and read.config.num_nextn_predict_layers == 0
    assert read.config.dspark == config.DSpark(5, 500, (4, 5, 6), 8)
    assert not config_io.parse_config(OFFICIAL).has_dspark
    written = config_io.official_config_dict(read.config)
    assert written == raw | {"num_nextn_predict_layers": 1}
    assert config_io.parse_config(written).config == read.config


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dspark_block_size": None}, "dspark_block_size is missing"),
        ({"dspark_target_layer_ids": None}, "dspark_target_layer_ids is missing"),
        ({"dspark_block_size": 0}, "dspark_block_size=0 must be an integer in 1"),
        ({"dspark_markov_rank": "8"}, "dspark_markov_rank='8' must be an integer"),
        ({"dspark_noise_token_id": 512}, "dspark_noise_token_id=512 must be less than vocab_size=512"),
        ({"dspark_target_layer_ids": [5, 7]}, "dspark_target_layer_ids [7] must lie in 0 .. 6"),
        ({"dspark_target_layer_ids": [5, 5]}, "must be different layers"),
        ({"dspark_target_layer_ids": []}, "at least one"),
    ],
)
def test_keys_of_a_dspark_head_are_checked(change, problem):
    (found,) = problems_of(OFFICIAL | DSPARK | change)
    assert problem in found


def test_a_model_has_one_draft_head():
    head = config.DSpark(5, 500, (4, 5, 6), 8)
    with pytest.raises(errors.ConfigError, match="an MTP block or a DSpark draft head"):
        config.tiny(dspark=head)


# wrong content

YARN = OFFICIAL["rope_scaling"]
MAIN, COMPRESS = (
    TRANSFORMERS["rope_parameters"]["main"],
    TRANSFORMERS["rope_parameters"]["compress"],
)

WRONG = [
    # no default patterns
    (without(OFFICIAL, "compress_ratios"), "the layer plan is missing"),
    (without(TRANSFORMERS, "layer_types"), "the layer plan is missing"),
    (
        without(OFFICIAL, "num_hash_layers"),
        "num_hash_layers (or n_hash_layers, mlp_layer_types) is",
    ),
    (without(OFFICIAL, "rope_scaling"), "the YaRN block is missing"),
    (OFFICIAL | {"rope_scaling": None}, "the YaRN block is missing"),
    (
        without(TRANSFORMERS, "compress_rates"),
        "compress_rates.compressed_sparse_attention is missing",
    ),
    (
        without(OFFICIAL, "qk_rope_head_dim"),
        "qk_rope_head_dim (or partial_rotary_factor) is missing",
    ),
    (without(OFFICIAL, "compress_rope_theta"), "compress_rope_theta is missing"),
    (without(OFFICIAL, "index_topk"), "index_topk is missing"),
    (without(OFFICIAL, "hc_eps"), "hc_eps is missing"),
    (
        without(OFFICIAL, "num_nextn_predict_layers"),
        "num_nextn_predict_layers (or n_mtp_layers) is",
    ),
    (without(OFFICIAL, "model_type"), "model_type is missing"),
    # lengths and kinds
    (OFFICIAL | {"compress_ratios": [0, 4]}, "compress_ratios names 2 layers; num_hidden_layers=7"),
    (
        OFFICIAL | {"compress_ratios": [0, 0, 4, 64, 4, 128, 4]},
        "compress_ratios[3]=64 does not name",
    ),
    (OFFICIAL | {"compress_ratios": "0,0,4"}, "compress_ratios='0,0,4' must be a list"),
    (
        OFFICIAL | {"compress_ratios": [0, True, 4] * 3},
        "compress_ratios[1]=True must be an integer",
    ),
    (OFFICIAL | {"num_hash_layers": 8}, "num_hash_layers=8 must lie in 0 .. num_hidden_layers=7"),
    (OFFICIAL | {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 must be in 1"),
    (TRANSFORMERS | {"layer_types": ["sliding_attention"]}, "layer_types names 1 layers"),
    (TRANSFORMERS | {"layer_types": [["full_attention"]] * 7}, "must be one of sliding_attention"),
    (TRANSFORMERS | {"mlp_layer_types": ["moe"] * 6}, "mlp_layer_types names 6 layers"),
    (TRANSFORMERS | {"mlp_layer_types": ["dense"] * 7}, "must be one of hash_moe, moe"),
    # both families, disagreeing
    (
        OFFICIAL | {"layer_types": ["sliding_attention"] * 7},
        "layer 2: compress_ratios says 4 (csa) but layer_types says sliding_attention",
    ),
    (OFFICIAL | {"mlp_layer_types": ["moe"] * 7}, "num_hash_layers=3 but mlp_layer_types names 0"),
    (OFFICIAL | {"partial_rotary_factor": 0.5}, "partial_rotary_factor * head_dim=16: they must"),
    (OFFICIAL | {"num_local_experts": 9}, "n_routed_experts=8 but num_local_experts=9"),
    (OFFICIAL | {"dim": 65}, "hidden_size=64 but dim=65"),
    (OFFICIAL | {"rope_parameters": {"main": MAIN | {"rope_theta": 2e4}}}, "rope_theta=20000.0"),
    (
        OFFICIAL | {"rope_parameters": {"main": MAIN, "compress": COMPRESS | {"factor": 8}}},
        "rope_parameters.compress=Yarn(factor=8.0",
    ),
    # RoPE
    (
        OFFICIAL | {"rope_scaling": YARN | {"attention_factor": 1.277}},
        "attention_factor=1.277 must",
    ),
    (OFFICIAL | {"rope_scaling": YARN | {"type": "linear"}}, "rope_scaling.type='linear' must be"),
    (
        OFFICIAL | {"rope_scaling": without(YARN, "type")},
        "rope_scaling.rope_type (or type) is miss",
    ),
    (OFFICIAL | {"rope_scaling": without(YARN, "beta_fast")}, "rope_scaling.beta_fast is missing"),
    (
        OFFICIAL | {"rope_scaling": YARN | {"mscale": 0.707}},
        "rope_scaling.mscale=0.707 must be absent",
    ),
    (
        TRANSFORMERS | {"rope_parameters": {"main": MAIN | {"factor": 2.0}, "compress": COMPRESS}},
        "rope_parameters.main.factor=2.0 must be absent",
    ),
    (
        TRANSFORMERS | {"rope_parameters": {"main": MAIN, "compress": COMPRESS | {"rope_type": "default"}}},
        "rope_parameters.compress.rope_type='default' must be 'yarn'",
    ),
    (TRANSFORMERS | {"rope_parameters": {"main": MAIN}}, "the YaRN block is missing"),
    (
        without(TRANSFORMERS, "qk_rope_head_dim") | {"partial_rotary_factor": 0.3},
        "must be n / head_dim",
    ),
    # one supported value
    (OFFICIAL | {"num_key_value_heads": 2}, "num_key_value_heads=2 must be 1"),
    (OFFICIAL | {"num_key_value_heads": True}, "num_key_value_heads=True must be 1"),
    (OFFICIAL | {"n_shared_experts": 2}, "n_shared_experts=2 must be 1"),
    (OFFICIAL | {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' must be 'sqrtsoftplus'"),
    (OFFICIAL | {"topk_method": "greedy"}, "topk_method='greedy' must be 'noaux_tc'"),
    (OFFICIAL | {"norm_topk_prob": False}, "norm_topk_prob=False must be True"),
    (OFFICIAL | {"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
    (OFFICIAL | {"tie_word_embeddings": True}, "tie_word_embeddings=True must be False"),
    (OFFICIAL | {"attention_bias": True}, "attention_bias=True must be False"),
    (OFFICIAL | {"attention_dropout": 0.1}, "attention_dropout=0.1 must be 0.0"),
    # types and rules
    (OFFICIAL | {"hidden_size": True}, "hidden_size=True must be an integer"),
    (OFFICIAL | {"hidden_size": 64.0}, "hidden_size=64.0 must be an integer"),
    (OFFICIAL | {"hidden_size": None}, "hidden_size (or dim) is missing"),
    (OFFICIAL | {"swiglu_limit": "10"}, "swiglu_limit='10' must be a finite number"),
    (OFFICIAL | {"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be a finite number"),
    (OFFICIAL | {"rope_scaling": ["yarn"]}, "rope_scaling=['yarn'] must be an object"),
    (OFFICIAL | {"eos_token_id": [1, "2"]}, "eos_token_id=[1, '2'] must be a token id or a list"),
    (OFFICIAL | {"eos_token_id": []}, "eos_token_id=[] must be a token id or a list"),
    (OFFICIAL | {"eos_token_id": [1, 512]}, "eos_token_id=(1, 512) must lie in the vocabulary"),
    (OFFICIAL | {"bos_token_id": [1, 2]}, "bos_token_id=[1, 2] must be one token id"),
    (OFFICIAL | {"num_experts_per_tok": 9}, "num_experts_per_tok=9 must not exceed n_routed"),
    (OFFICIAL | {"o_groups": 3}, "num_attention_heads=4 must be a multiple of o_groups=3"),
    (OFFICIAL | {"eos_token_id": 512}, "eos_token_id=512 must lie in the vocabulary"),
]


@pytest.mark.parametrize(("raw", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_keys(raw, message):
    found = problems_of(raw)
    assert any(message in problem for problem in found), found


def test_all_problems_at_once_and_each_once():
    raw = without(OFFICIAL, "rope_scaling", "hc_mult")
    raw |= {"hidden_size": True, "o_groups": 3, "scoring_func": "softmax"}
    found = problems_of(raw)
    assert len(found) == len(set(found)) == 5, found
    assert "config does not describe a supported DeepSeek-V4 model: 5 problems" in str(
        errors.ConfigError("config does not describe a supported DeepSeek-V4 model", found)
    )


def test_an_empty_object_shows_twenty_problems_and_a_count():
    with pytest.raises(errors.ConfigError, match=r"\.\.\. and \d+ more"):
        config_io.parse_config({})


@pytest.mark.parametrize("eos", [None, 5, [5], [1, 327]])
def test_end_tokens_are_written_as_they_were_read(eos):
    read = config_io.parse_config(OFFICIAL | {"eos_token_id": eos, "bos_token_id": [7]}).config
    assert (read.eos_token_id, read.bos_token_id) == (tuple(eos) if isinstance(eos, list) else eos, 7)
    for written in (config_io.official_config_dict(read), config_io.transformers_config_dict(read)):
        assert written["eos_token_id"] == eos


def test_a_ratio_of_one_is_no_compression():
    ratios = [1 if ratio == 0 else ratio for ratio in OFFICIAL["compress_ratios"]]
    assert 1 in ratios[:2] and ratios[-1] == 1  # two window layers, and the draft entry
    read = config_io.parse_config(OFFICIAL | {"compress_ratios": ratios}).config
    assert read == config_io.parse_config(OFFICIAL).config
    assert config_io.official_config_dict(read)["compress_ratios"] == OFFICIAL["compress_ratios"]


# other models

V41 = (
    "DeepSeek-V4.1 is a different architecture (single-pass mHC, CSA2, Engram, 40 layers) and is"
    " not supported"
)
VISION = "vision variant; text-only loading needs an explicit flag"
NVFP4 = "the quantization method 'nvfp4' is not supported; use the official deepseek-ai checkpoint"


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"model_type": "deepseek_v41"}, V41),
        ({"model_type": "deepseek_v41_text"}, V41),
        (OFFICIAL | {"architectures": ["DeepseekV41ForCausalLM"]}, V41),
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3' is not supported"),
        ({"model_type": 4}, "model_type=4 is not supported"),
        (
            OFFICIAL | {"architectures": ["LlamaForCausalLM"]},
            "'LlamaForCausalLM'] is not supported",
        ),
        (OFFICIAL | {"architectures": "Llama"}, "architectures=['Llama'] is not supported"),
        (OFFICIAL | {"vision_config": {}}, VISION),
        (OFFICIAL | {"quantization_config": {"quant_method": "nvfp4"}}, NVFP4),
        (OFFICIAL | {"quantization_config": "fp8"}, "quantization_config='fp8' must be an object"),
    ],
)
def test_refused_with_one_sentence(raw, sentence):
    found = problems_of(raw)
    assert len(found) == 1 and sentence in found[0]


def test_accepted_neighbours():
    for extra in (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": None, "expert_dtype": "fp4"},
        {"auto_map": {"AutoModel": "evil.py"}, "vision_config": None},
        {"architectures": ["DeepseekV4Model"]},
        {"n_shared_experts": None, "topk_method": None},
    ):
        assert config_io.parse_config(OFFICIAL | extra).config == config.tiny()
    vision = OFFICIAL | {"vision_config": {}}
    read = config_io.parse_config(vision, text_only=True)
    assert read.config == config.tiny()
    assert read.notes == ("vision variant: only its text model is used",)


# the file


def write(directory: pathlib.Path, text: str | bytes) -> pathlib.Path:
    path = directory / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "unbalanced brackets"),
        ("[1]", "a JSON list, not an object"),
        ("null", "a JSON NoneType, not an object"),
        (b'{"a": "\xff"}', "is not UTF-8 (byte 7"),
        ("[" * 200_000, "nested deeper than 32"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-LFS pointer"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    with pytest.raises(errors.ConfigError) as caught:
        config_io.read_config(write(tmp_path, content))
    assert message in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


def test_missing_file_and_directory_in_its_place(tmp_path):
    with pytest.raises(errors.ConfigError, match="No such file"):
        config_io.read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(errors.ConfigError, match="config.json"):
        config_io.read_config(tmp_path)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_literals(tmp_path, literal):
    text = json.dumps(OFFICIAL).replace('"hc_eps": 1e-06', f'"hc_eps": {literal}')
    with pytest.raises(errors.ConfigError) as caught:
        config_io.read_config(write(tmp_path, text))
    assert caught.value.problems == (f"the JSON literal {literal} is not a number",)


def test_duplicate_keys_at_any_depth(tmp_path):
    text = json.dumps(OFFICIAL)[:-1] + ', "hidden_size": 64, "hidden_size": 65, "o_groups": 4}'
    text = text.replace('"factor": 16.0', '"factor": 16.0, "factor": 16.0')
    with pytest.raises(errors.ConfigError) as caught:
        config_io.read_config(write(tmp_path, text))
    assert caught.value.problems == (
        "the JSON key 'factor' appears twice in one object",
        "the JSON key 'hidden_size' appears twice in one object",
        "the JSON key 'o_groups' appears twice in one object",
    )


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from([OFFICIAL, TRANSFORMERS]),
    changes=st.dictionaries(st.sampled_from(sorted(OFFICIAL | TRANSFORMERS)), JSON_VALUES, max_size=4),
    nested=st.dictionaries(st.sampled_from([*YARN, "rope_theta", "main"]), JSON_VALUES, max_size=2),
)
def test_fuzzed_values_are_accepted_or_refused_but_never_crash(base, changes, nested):
    raw = copy.deepcopy(base) | changes
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(raw.get(name), dict):
            raw[name] = raw[name] | nested
    try:
        read = config_io.parse_config(raw).config
    except errors.ConfigError:
        return
    assert config_io.parse_config(config_io.official_config_dict(read)).config == read
