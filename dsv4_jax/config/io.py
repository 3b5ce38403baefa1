"""`config.json` in and out: the official keys, the transformers keys, and `inference/config.json`.

Nothing that shapes the model is guessed: a missing layer plan or YaRN block is an error, a key that
is given under two names must agree with itself, and all problems are reported at once.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping

from dsv4_jax import errors
from dsv4_jax.config import ModelConfig, json_objects, rules
from dsv4_jax.config.keys import Keys
from dsv4_jax.config.kinds import DSPARK_STAGES, DSpark, Yarn
from dsv4_jax.config.layer_plan import LAYER_TYPES, MLP_LAYER_TYPES, read_layer_plan, read_rope
from dsv4_jax.reading.folder import Folder
from dsv4_jax.reading.foreign import foreign_config, foreign_folder
from dsv4_jax.reading.stored_file import StoredFile
from dsv4_jax.reading.strict_json import JsonError

CONFIG_FILE = "config.json"
MODEL_TYPE = "deepseek_v4"
ARCHITECTURE = "DeepseekV4ForCausalLM"
DSPARK_NOTE = "this checkpoint carries a DSpark draft head (3 stages under mtp.*)"
V41_REFUSAL = (
    "DeepSeek-V4.1 is a different architecture (single-pass mHC, CSA2, Engram, 40 layers) and is"
    " not supported"
)
VISION_REFUSAL = "vision variant; text-only loading needs an explicit flag"
VISION_NOTE = "vision variant: only its text model is used"

# ModelConfig field -> the names it goes by: official, transformers alias, inference/config.json.
_COUNT_KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "dim"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "head_dim": ("head_dim",),
    "q_lora_rank": ("q_lora_rank",),
    "o_groups": ("o_groups",),
    "o_lora_rank": ("o_lora_rank",),
    "sliding_window": ("sliding_window", "window_size"),
    "index_n_heads": ("index_n_heads",),
    "index_head_dim": ("index_head_dim",),
    "index_topk": ("index_topk",),
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "n_activated_experts"),
    "moe_intermediate_size": ("moe_intermediate_size", "intermediate_size", "moe_inter_dim"),
    "hc_mult": ("hc_mult",),
    "hc_sinkhorn_iters": ("hc_sinkhorn_iters",),
}
_REAL_KEYS: dict[str, tuple[str, ...]] = {
    "routed_scaling_factor": ("routed_scaling_factor", "route_scale"),
    "swiglu_limit": ("swiglu_limit",),
}
_EPS_KEYS: dict[str, tuple[str, ...]] = {
    "hc_eps": ("hc_eps",),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
}
# Keys with one supported value. An absent one is fine: V4 knows no other.
_FIXED_KEYS: tuple[tuple[tuple[str, ...], object], ...] = (
    (("num_key_value_heads",), 1),
    (("n_shared_experts",), 1),
    (("scoring_func", "score_func"), "sqrtsoftplus"),
    (("topk_method",), "noaux_tc"),
    (("norm_topk_prob",), True),
    (("hidden_act",), "silu"),
    (("tie_word_embeddings",), False),
    (("attention_bias",), False),
    (("mlp_bias",), False),
    (("attention_dropout",), 0.0),
)
_INFERENCE_EPS = 1e-6
"""`inference/config.json` may leave both eps to the official code, whose value this is."""


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A configuration as read from a file.

    Attributes:
        config: the model. With a DSpark draft head it has no MTP block.
        raw: the JSON object itself, for storage facts (`quantization_config`, `expert_dtype`).
        notes: what the reader should tell the user.
        has_dspark: the checkpoint carries a DSpark draft head instead of an MTP block.
    """

    config: ModelConfig
    raw: Mapping[str, object]
    notes: tuple[str, ...]
    has_dspark: bool


def read_config(
    path: str | pathlib.Path, *, text_only: bool = False, allow_links: str | pathlib.Path | None = None
) -> ModelConfig:
    """Reads the model configuration of a checkpoint.

    Args:
        path: a `config.json` (or `inference/config.json`), or the directory with a `config.json`.
        text_only: accept the vision variant and take its text model.
        allow_links: a folder that links of the directory may lead into, see `dsv4_jax.reading.folder`.

    Raises:
        ConfigError: with every problem at once; nothing is defaulted that a checkpoint determines.
    """
    return read_config_file(path, text_only=text_only, allow_links=allow_links).config


def read_config_file(
    path: str | pathlib.Path, *, text_only: bool = False, allow_links: str | pathlib.Path | None = None
) -> ConfigFile:
    """`read_config` with the notes and the raw JSON; same arguments and errors."""
    path = pathlib.Path(path)
    try:
        if not os.path.isdir(path):
            with StoredFile(path) as file:
                return _parse_file(file.read_document(json_objects.MAX_JSON_BYTES), path, text_only)
        with Folder(path, allow_links) as folder:
            if CONFIG_FILE not in folder.names and (problem := foreign_folder(folder.names)):
                raise errors.ConfigError(f"cannot read {path}", [problem])
            return read_config_in(folder, text_only=text_only)
    except errors.CheckpointError as refused:
        raise errors.ConfigError(f"cannot read {path}", refused.problems) from refused


def read_config_in(folder: Folder, *, text_only: bool = False) -> ConfigFile:
    """`read_config_file` of an open checkpoint folder.

    Raises:
        ConfigError: of what the file says.
        CheckpointError: the file is missing, or no regular file of the folder.
    """
    data = folder.read(CONFIG_FILE, json_objects.MAX_JSON_BYTES)
    return _parse_file(data, folder.directory / CONFIG_FILE, text_only)


def _parse_file(data: bytes, path: pathlib.Path, text_only: bool) -> ConfigFile:
    try:
        raw, problems = json_objects.parse_object(data)
    except JsonError as refused:
        raise errors.ConfigError(f"cannot read {path}", [f"it {refused}"]) from None
    return parse_config(raw, source=str(path), text_only=text_only, problems=problems)


def parse_config(
    raw: Mapping[str, object],
    *,
    source: str = "config",
    text_only: bool = False,
    problems: list[str] | None = None,
) -> ConfigFile:
    """Turns the keys of any of the three families into a `ModelConfig`.

    Args:
        raw: the JSON object.
        source: what error messages call it.
        text_only: as in `read_config`.
        problems: found while reading the file; reported together with those found here.

    Raises:
        ConfigError: see `read_config`.
    """
    what = f"{source} does not describe a supported DeepSeek-V4 model"
    refusals = _refusals(raw, text_only=text_only)
    if refusals:
        raise errors.ConfigError(what, refusals)

    keys = Keys(raw, list(problems or ()))
    inference = "n_layers" in raw and "num_hidden_layers" not in raw
    fields: dict[str, object] = {}
    for name, names in _COUNT_KEYS.items():
        fields[name] = keys.integer(*names)
    for name, names in _REAL_KEYS.items():
        fields[name] = keys.real(*names)
    for name, names in _EPS_KEYS.items():
        fields[name] = keys.real(*names, default=_INFERENCE_EPS if inference else None)
    fields |= read_layer_plan(keys)
    fields |= read_rope(keys, head_dim=fields["head_dim"])
    _read_lengths_and_tokens(keys, fields, inference=inference)

    has_dspark = any(key.startswith("dspark_") and raw[key] is not None for key in raw)
    if has_dspark:
        # The official file still says num_nextn_predict_layers = 1 (or 3): those are DSpark stages.
        fields["num_nextn_predict_layers"] = 0
        fields["dspark"] = _read_dspark(keys)
    for names, expected in _FIXED_KEYS:
        keys.fixed(names, expected)
    if not inference:
        keys.fixed(("model_type",), MODEL_TYPE, required=True)

    known = {name: value for name, value in fields.items() if value is not None}
    all_problems = keys.problems + rules.field_problems(known)
    if all_problems:
        raise errors.ConfigError(what, list(dict.fromkeys(all_problems)))
    notes = [VISION_NOTE] if _has_vision(raw) else []
    return ConfigFile(ModelConfig(**fields), raw, tuple(notes), has_dspark)


def _read_dspark(keys: Keys) -> DSpark | None:
    numbers = [keys.integer(f"dspark_{name}") for name in ("block_size", "noise_token_id", "markov_rank")]
    layers = keys.list_of("dspark_target_layer_ids", rules.is_int, "a layer number")
    if not keys.has("dspark_target_layer_ids"):
        keys.missing(("dspark_target_layer_ids",))
    if layers is None or None in numbers:
        return None
    block_size, noise, rank = numbers
    return DSpark(block_size, noise, tuple(layers), rank)


def _refusals(raw: Mapping[str, object], *, text_only: bool) -> list[str]:
    """Why this is another model or storage altogether; its other keys then mean nothing to us."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    names = architectures if isinstance(architectures, list) else [architectures]
    names = [name for name in names if name is not None]
    if model_type in ("deepseek_v41", "deepseek_v41_text") or any(
        isinstance(name, str) and name.startswith("DeepseekV41") for name in names
    ):
        return [V41_REFUSAL]
    refusals = []
    if model_type not in (None, MODEL_TYPE):
        refusals.append(f"model_type={rules.shown(model_type)} is not supported; only {MODEL_TYPE!r} is")
    elif names and not any(isinstance(n, str) and n.startswith("DeepseekV4") for n in names):
        refusals.append(f"architectures={rules.shown(names)} is not supported; only {ARCHITECTURE!r} is")
    if not text_only and _has_vision(raw):
        refusals.append(VISION_REFUSAL)
    quantization = raw.get("quantization_config")
    if method := foreign_config(raw):
        refusals.append(method)
    elif isinstance(quantization, Mapping):
        method = quantization.get("quant_method")
        if method not in (None, "fp8"):
            refusals.append(
                f"the quantization method {rules.shown(method)} is not supported;"
                " use the official deepseek-ai checkpoint"
            )
    elif quantization is not None:
        refusals.append(f"quantization_config={rules.shown(quantization)} must be an object")
    return refusals


def _has_vision(raw: Mapping[str, object]) -> bool:
    return any(key.startswith("vision_") and raw[key] is not None for key in raw)


def _read_lengths_and_tokens(keys: Keys, fields: dict[str, object], *, inference: bool) -> None:
    yarn = fields["yarn"]
    derived = None
    if inference and isinstance(yarn, Yarn):
        # inference/config.json has no such key; YaRN's reach is the official value (65536 * 16).
        derived = int(yarn.original_max_position_embeddings * yarn.factor)
    fields["max_position_embeddings"] = keys.integer("max_position_embeddings", default=derived)
    draft_entries = fields.pop("draft_entries")
    fields["num_nextn_predict_layers"] = keys.integer(
        "num_nextn_predict_layers", "n_mtp_layers", default=draft_entries if inference else None
    )
    # The only keys of config.json that no computation of a loaded model depends on.
    initializer_range = keys.real("initializer_range", default=0.02)
    fields["initializer_range"] = initializer_range
    fields["bos_token_id"] = keys.token("bos_token_id")
    fields["eos_token_id"] = keys.tokens("eos_token_id")


def official_config_dict(config: ModelConfig) -> dict[str, object]:
    """The official `config.json` of `config` (the names of the released files), unquantised.

    Ratios other than 4 and 128, and hash layers elsewhere than in front, have no official spelling;
    the transformers keys `layer_types`, `compress_rates`, `mlp_layer_types` are then added.
    """
    ratios = [config.ratio(kind) for kind in config.attention_kinds]
    num_hash = config.router_kinds.count("hash")
    hash_first = config.router_kinds[:num_hash] == ("hash",) * num_hash
    dspark = config.dspark
    result = _shared_keys(config) | {
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "compress_ratios": ratios + [0] * (DSPARK_STAGES if dspark else config.num_nextn_predict_layers),
        "rope_scaling": {"type": "yarn"} | dataclasses.asdict(config.yarn),
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    }
    if dspark is not None:
        # As the releases say it, whose stages are not counted anywhere.
        result["num_nextn_predict_layers"] = 1
        result |= {f"dspark_{name}": value for name, value in dataclasses.asdict(dspark).items()}
        result["dspark_target_layer_ids"] = list(dspark.target_layer_ids)
    if hash_first:
        result["num_hash_layers"] = num_hash
    else:
        result["mlp_layer_types"] = [MLP_LAYER_TYPES[kind] for kind in config.router_kinds]
    if (config.csa_ratio, config.hca_ratio) != (4, 128):
        result["layer_types"] = [LAYER_TYPES[kind] for kind in config.attention_kinds]
        result["compress_rates"] = _compress_rates(config)
    return result


def transformers_config_dict(config: ModelConfig) -> dict[str, object]:
    """The `config.json` of transformers 5.x for `config`; its `DeepseekV4Config` accepts it."""
    factor = config.qk_rope_head_dim / config.head_dim
    if int(config.head_dim * factor) != config.qk_rope_head_dim:
        factor = math.nextafter(factor, 1.0)  # transformers truncates the product
    main = {"rope_type": "default", "rope_theta": config.rope_theta}
    compress = {"rope_type": "yarn", "rope_theta": config.compress_rope_theta}
    compress |= dataclasses.asdict(config.yarn) | {"attention_factor": 1.0}
    return _shared_keys(config) | {
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "partial_rotary_factor": factor,
        "layer_types": [LAYER_TYPES[kind] for kind in config.attention_kinds],
        "compress_rates": _compress_rates(config),
        "mlp_layer_types": [MLP_LAYER_TYPES[kind] for kind in config.router_kinds],
        "rope_parameters": {
            "main": main | {"partial_rotary_factor": factor},
            "compress": compress | {"partial_rotary_factor": factor},
        },
        "mlp_bias": False,
        "dtype": "bfloat16",
    }


def token_json(ids: int | tuple[int, ...] | None) -> int | list[int] | None:
    """Token ids as JSON spells them."""
    return list(ids) if isinstance(ids, tuple) else ids


def _compress_rates(config: ModelConfig) -> dict[str, int]:
    return {LAYER_TYPES["csa"]: config.csa_ratio, LAYER_TYPES["hca"]: config.hca_ratio}


def _shared_keys(config: ModelConfig) -> dict[str, object]:
    """The keys that both families spell alike."""
    names = [*_COUNT_KEYS, *_REAL_KEYS, *_EPS_KEYS]
    names += ["rope_theta", "compress_rope_theta", "max_position_embeddings"]
    names += ["num_nextn_predict_layers", "bos_token_id", "eos_token_id", "initializer_range"]
    fixed = ("num_key_value_heads", "n_shared_experts", "scoring_func", "norm_topk_prob")
    fixed += ("hidden_act", "tie_word_embeddings", "attention_bias", "attention_dropout")
    values = {keys[0]: value for keys, value in _FIXED_KEYS}
    return (
        {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
        | {"num_hidden_layers": config.num_hidden_layers}
        | {name: getattr(config, name) for name in names}
        | {"eos_token_id": token_json(config.eos_token_id)}
        | {name: values[name] for name in fixed}
        | {"use_cache": True}
    )
