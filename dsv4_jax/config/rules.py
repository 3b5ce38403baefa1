"""Every rule that the fields of a `ModelConfig` must keep, as one table.

`field_problems` is run by `ModelConfig` itself, and serves the config reader, which may hold only part of the
fields and wants all problems at once.
"""

import math
import typing
from collections.abc import Callable, Mapping

from dsv4_jax.config.kinds import AttentionKind, DSpark, RouterKind, Yarn

MAX_DIM = 2**31 - 1
"""Upper bound of every count and size: larger values are damage, not a model."""

MAX_LAYERS = 1000
"""Upper bound of the layers, which are listed one by one; the released models have up to 61."""

ATTENTION_KINDS: tuple[str, ...] = typing.get_args(AttentionKind)
ROUTER_KINDS: tuple[str, ...] = typing.get_args(RouterKind)

_COUNTS = (  # int, 1 .. MAX_DIM
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "csa_ratio",
    "hca_ratio",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
_POSITIVE_REALS = ("hc_eps", "rms_norm_eps", "routed_scaling_factor")
_NON_NEGATIVE_REALS = ("swiglu_limit", "initializer_range")
_BASES_ABOVE_ONE = ("rope_theta", "compress_rope_theta")  # YaRN divides by ln(theta)
_TOKEN_IDS = ("bos_token_id", "eos_token_id")

_Rule = tuple[tuple[str, ...], Callable[..., bool], str]

# Fields that belong together: (names, what must hold, what is said when it does not).
_RELATIONS: tuple[_Rule, ...] = (
    (
        ("num_attention_heads", "o_groups"),
        lambda heads, groups: heads % groups == 0,
        "num_attention_heads={} must be a multiple of o_groups={}",
    ),
    (
        ("qk_rope_head_dim",),
        lambda rotary: rotary % 2 == 0,
        "qk_rope_head_dim={} must be even: channels are rotated in pairs",
    ),
    (
        ("qk_rope_head_dim", "head_dim"),
        lambda rotary, head: rotary <= head,
        "qk_rope_head_dim={} must not exceed head_dim={}",
    ),
    (
        ("qk_rope_head_dim", "index_head_dim"),
        lambda rotary, head: rotary <= head,
        "qk_rope_head_dim={} must not exceed index_head_dim={}",
    ),
    (
        ("index_head_dim",),
        lambda head: head & (head - 1) == 0,
        "index_head_dim={} must be a power of two (Hadamard transform)",
    ),
    (
        ("num_experts_per_tok", "n_routed_experts"),
        lambda active, experts: active <= experts,
        "num_experts_per_tok={} must not exceed n_routed_experts={}",
    ),
    (
        ("num_nextn_predict_layers",),
        lambda blocks: blocks in (0, 1),
        "num_nextn_predict_layers={} must be 0 or 1",
    ),
)


def field_problems(fields: Mapping[str, object]) -> list[str]:
    """The rules broken by `ModelConfig` fields, of which some may be missing.

    A relation between fields is checked only when each of them is present and well-formed alone, so
    that one mistake is reported once.
    """
    problems: list[str] = []
    sound: dict[str, typing.Any] = {}
    for name, value in fields.items():
        problem = _value_problem(name, value)
        if problem:
            problems.append(problem)
        else:
            sound[name] = value
    for names, holds, message in _RELATIONS:
        if all(name in sound for name in names):
            values = [sound[name] for name in names]
            if not holds(*values):
                problems.append(message.format(*values))
    problems += _layer_problems(sound) + _token_problems(sound) + _draft_problems(sound)
    return problems


def is_int(value: object) -> bool:
    """True for an `int` that is not a `bool`."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """True for a finite `int` or `float` (not a `bool`) within float64's range."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_int(value) and abs(typing.cast(int, value)) <= 2**53


def shown(value: object) -> str:
    """`repr(value)`, cut to a length fit for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _value_problem(name: str, value: object) -> str | None:
    """What is wrong with one field looked at alone, or None."""
    said = f"{name}={shown(value)}"
    if name in _COUNTS:
        if not is_int(value):
            return f"{said} must be an integer"
        if not 1 <= value <= MAX_DIM:
            return f"{said} must lie in 1 .. {MAX_DIM}"
    elif name in _POSITIVE_REALS:
        if not is_real(value) or not value > 0:
            return f"{said} must be a finite number greater than 0"
    elif name in _NON_NEGATIVE_REALS:
        if not is_real(value) or not value >= 0:
            return f"{said} must be a finite number, 0 or greater"
    elif name in _BASES_ABOVE_ONE:
        if not is_real(value) or not value > 1:
            return f"{said} must be a finite number greater than 1"
    elif name == "num_nextn_predict_layers":
        if not is_int(value):
            return f"{said} must be an integer"
    elif name == "bos_token_id":
        if value is not None and not is_int(value):
            return f"{said} must be an integer or absent"
    elif name == "eos_token_id":
        if isinstance(value, tuple) and not (value and all(map(is_int, value))):
            return f"{said} must hold at least one integer, and nothing else"
        if not isinstance(value, tuple) and value is not None and not is_int(value):
            return f"{said} must be an integer, a tuple of integers, or absent"
    elif name == "attention_kinds":
        return _kinds_problem(name, value, ATTENTION_KINDS)
    elif name == "router_kinds":
        return _kinds_problem(name, value, ROUTER_KINDS)
    elif name == "yarn":
        return _yarn_problem(value)
    elif name == "dspark":
        return _dspark_problem(value)
    return None


def _kinds_problem(name: str, value: object, known: tuple[str, ...]) -> str | None:
    if not isinstance(value, tuple) or not value:
        return f"{name}={shown(value)} must be a non-empty tuple, one kind a layer"
    if len(value) > MAX_LAYERS:
        return f"{name} names {len(value)} layers; at most {MAX_LAYERS} are accepted"
    first_layer: dict[str, int] = {}
    for layer, kind in enumerate(value):
        if kind not in known:
            first_layer.setdefault(shown(kind), layer)
    if not first_layer:
        return None
    found = ", ".join(f"{kind} (first at layer {layer})" for kind, layer in first_layer.items())
    return f"{name} must hold only {', '.join(known)}; found {found}"


def _dspark_problem(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, DSpark):
        return f"dspark={shown(value)} must be a DSpark, or absent"
    for name, least in (("block_size", 1), ("noise_token_id", 0), ("markov_rank", 1)):
        number = getattr(value, name)
        if not is_int(number) or not least <= number <= MAX_DIM:
            return f"dspark_{name}={shown(number)} must be an integer in {least} .. {MAX_DIM}"
    ids = value.target_layer_ids
    if not isinstance(ids, tuple) or not ids or not all(is_int(i) and i >= 0 for i in ids):
        return f"dspark_target_layer_ids={shown(ids)} must be layer numbers, at least one"
    if len(set(ids)) < len(ids):
        return f"dspark_target_layer_ids={shown(ids)} must be different layers"
    return None


def _yarn_problem(value: object) -> str | None:
    if not isinstance(value, Yarn):
        return f"yarn={shown(value)} must be a Yarn"
    wrong = []
    for name in ("factor", "beta_fast", "beta_slow"):
        if not is_real(getattr(value, name)):
            wrong.append(f"{name}={shown(getattr(value, name))} must be a finite number")
    if not wrong:
        if value.factor < 1:
            wrong.append(f"factor={value.factor} must be at least 1")
        if not value.beta_fast >= value.beta_slow > 0:
            wrong.append(
                f"beta_fast={value.beta_fast} and beta_slow={value.beta_slow} must satisfy"
                " beta_fast >= beta_slow > 0"
            )
    original = value.original_max_position_embeddings
    if not is_int(original) or not 1 <= original <= MAX_DIM:
        wrong.append(
            f"original_max_position_embeddings={shown(original)} must be an integer in 1 .. {MAX_DIM}"
        )
    return "yarn: " + "; ".join(wrong) if wrong else None


def _layer_problems(sound: Mapping[str, typing.Any]) -> list[str]:
    if "attention_kinds" not in sound or "router_kinds" not in sound:
        return []
    layers, routers = len(sound["attention_kinds"]), len(sound["router_kinds"])
    if layers == routers:
        return []
    return [f"attention_kinds names {layers} layers but router_kinds names {routers}"]


def _token_problems(sound: Mapping[str, typing.Any]) -> list[str]:
    vocab = sound.get("vocab_size")
    if vocab is None:
        return []
    return [p for name in _TOKEN_IDS for p in token_problems(name, sound.get(name), vocab)]


def _draft_problems(sound: Mapping[str, typing.Any]) -> list[str]:
    dspark, problems = sound.get("dspark"), []
    if dspark is None:
        return []
    if blocks := sound.get("num_nextn_predict_layers"):
        problems.append(f"num_nextn_predict_layers={blocks}: a model has an MTP block or a DSpark draft head")
    noise, vocab = dspark.noise_token_id, sound.get("vocab_size")
    if vocab is not None and noise >= vocab:
        problems.append(f"dspark_noise_token_id={noise} must be less than vocab_size={vocab}")
    layers = len(sound.get("attention_kinds", ()))
    if layers and (beyond := [layer for layer in dspark.target_layer_ids if layer >= layers]):
        problems.append(f"dspark_target_layer_ids {beyond} must lie in 0 .. {layers - 1}")
    return problems


def token_ids(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The ids of a field that may hold one, several or none."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def token_problems(name: str, value: int | tuple[int, ...] | None, vocab_size: int) -> list[str]:
    """A sentence for ids outside the vocabulary."""
    if all(0 <= token < vocab_size for token in token_ids(value)):
        return []
    return [f"{name}={shown(value)} must lie in the vocabulary, 0 .. {vocab_size - 1}"]
