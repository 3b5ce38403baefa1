"""The two parts of a config.json that families spell differently: the layer plan and RoPE.

Loader rules: either family is accepted; if both are present they must agree; nothing falls back to
a default pattern.
"""

from collections.abc import Callable, Mapping

from dsv4_jax.config import rules
from dsv4_jax.config.keys import Keys
from dsv4_jax.config.kinds import Yarn

LAYER_TYPES: Mapping[str, str] = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
"""Attention kind -> transformers' name in `layer_types` and `compress_rates`."""

MLP_LAYER_TYPES: Mapping[str, str] = {"hash": "hash_moe", "learned": "moe"}
"""Router kind -> transformers' name in `mlp_layer_types`."""

STANDARD_RATIOS: Mapping[str, int] = {"csa": 4, "hca": 128}
"""What the numbers of `compress_ratios` mean unless `compress_rates` says otherwise."""

_LEGACY_RATES = {"csa": "compress_rate_csa", "hca": "compress_rate_hca"}
_KIND_OF_TYPE = {name: kind for kind, name in LAYER_TYPES.items()}
_ROUTER_OF_TYPE = {name: kind for kind, name in MLP_LAYER_TYPES.items()}
_YARN_KEYS = {"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}
_ROPE_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor"}


def read_layer_plan(keys: Keys) -> dict[str, object]:
    """The fields `attention_kinds`, `router_kinds`, `csa_ratio`, `hca_ratio`.

    Also gives `draft_entries`, the number of `compress_ratios` beyond the layers (one per MTP
    block). A value is None when it cannot be told; the reason is then in `keys.problems`.
    """
    num_layers = keys.integer("num_hidden_layers", "n_layers")
    if num_layers is not None and not 1 <= num_layers <= rules.MAX_LAYERS:
        keys.complain("num_hidden_layers", num_layers, f"in 1 .. {rules.MAX_LAYERS}")
        num_layers = None
    rates = _read_rates(keys)
    ratios = _uncompressed_as_zero(keys.list_of("compress_ratios", rules.is_int, "an integer ratio"), rates)
    types = keys.list_of("layer_types", *_names_of(_KIND_OF_TYPE))
    plan: dict[str, object] = {"attention_kinds": None, "router_kinds": None, "draft_entries": 0}
    if num_layers is not None:
        from_types = _kinds_of_types(keys, "layer_types", types, _KIND_OF_TYPE, num_layers)
        from_ratios = _kinds_of_ratios(keys, ratios, rates, num_layers, from_types)
        plan["attention_kinds"] = from_ratios or from_types
        plan["draft_entries"] = max(len(ratios or ()) - num_layers, 0)
        plan["router_kinds"] = _read_routers(keys, num_layers)
    if not keys.has("compress_ratios", "layer_types"):
        keys.problems.append(
            "the layer plan is missing: neither compress_ratios nor layer_types is given,"
            " and no default pattern is assumed"
        )
    for kind in ("csa", "hca"):
        stated = ratios is not None or kind in rates
        if not stated and plan["attention_kinds"] and kind in plan["attention_kinds"]:
            keys.problems.append(f"compress_rates.{LAYER_TYPES[kind]} is missing")
        plan[f"{kind}_ratio"] = rates.get(kind, STANDARD_RATIOS[kind])
    return plan


def _read_rates(keys: Keys) -> dict[str, int]:
    """`compress_rates`, with the legacy scalars folded in; unmentioned kinds are absent."""
    block = keys.block("compress_rates")
    rates: dict[str, int] = {}
    for kind, legacy in _LEGACY_RATES.items():
        found = {}
        if block is not None and block.has(LAYER_TYPES[kind]):
            found[f"compress_rates.{LAYER_TYPES[kind]}"] = block.integer(LAYER_TYPES[kind])
        if keys.has(legacy):
            found[legacy] = keys.integer(legacy)
        if len(set(found.values()) - {None}) > 1:
            said = " but ".join(f"{name}={value}" for name, value in found.items())
            keys.problems.append(f"{said}: two names of one value must agree")
        elif found and None not in found.values():
            rates[kind] = next(iter(found.values()))
    if block is not None:
        for name in set(block.raw) - set(_KIND_OF_TYPE):
            block.problems.append(f"compress_rates.{name}: no such layer type")
    return rates


def _uncompressed_as_zero(ratios: list[int] | None, rates: Mapping[str, int]) -> list[int] | None:
    """`compress_ratios` with 0 for layers and draft blocks without compression; some files say 1.

    One token an entry is no compression, unless `compress_rates` gives that ratio to a layer kind.
    """
    if ratios is None or 1 in rates.values():
        return ratios
    return [0 if ratio == 1 else ratio for ratio in ratios]


def _kinds_of_types(
    keys: Keys,
    name: str,
    types: list[object] | None,
    kind_of: Mapping[str, str],
    num_layers: int,
) -> tuple[str, ...] | None:
    if types is None:
        return None
    if len(types) != num_layers:
        keys.problems.append(f"{name} names {len(types)} layers; num_hidden_layers={num_layers}")
        return None
    return tuple(kind_of[str(item)] for item in types)


def _kinds_of_ratios(
    keys: Keys,
    ratios: list[object] | None,
    rates: Mapping[str, int],
    num_layers: int,
    from_types: tuple[str, ...] | None,
) -> tuple[str, ...] | None:
    """Kinds by `compress_ratios`; where both families are present every layer must agree."""
    if ratios is None:
        return None
    if len(ratios) < num_layers:
        keys.problems.append(f"compress_ratios names {len(ratios)} layers; num_hidden_layers={num_layers}")
        return None
    beyond = [ratio for ratio in ratios[num_layers:] if ratio != 0]
    if beyond:
        keys.problems.append(
            f"compress_ratios beyond layer {num_layers - 1} describe draft blocks and must be 0;"
            f" found {rules.shown(beyond)}"
        )
    ratio_of = {"window": 0} | dict(STANDARD_RATIOS) | dict(rates)
    kinds, unknown = [], {}
    for layer, ratio in enumerate(ratios[:num_layers]):
        fitting = [kind for kind, value in ratio_of.items() if value == ratio]
        if from_types is not None and from_types[layer] in fitting:
            fitting = [from_types[layer]]
        if len(fitting) != 1:
            unknown.setdefault(ratio, layer)
        kinds.append(fitting[0] if fitting else "")
    for ratio, layer in unknown.items():
        known = ", ".join(f"{value} ({kind})" for kind, value in ratio_of.items())
        keys.problems.append(
            f"compress_ratios[{layer}]={ratio} does not name one layer kind; known are {known}."
            " Other ratios need compress_rates; equal ones also layer_types"
        )
    if unknown:
        return None
    if from_types is not None:
        for layer, (ours, theirs) in enumerate(zip(kinds, from_types, strict=True)):
            if ours != theirs:
                keys.problems.append(
                    f"layer {layer}: compress_ratios says {ratios[layer]} ({ours}) but layer_types"
                    f" says {LAYER_TYPES[theirs]}"
                )
                return None
    return tuple(kinds)


def _read_routers(keys: Keys, num_layers: int) -> tuple[str, ...] | None:
    """Router kinds by `num_hash_layers` or `mlp_layer_types`; both must agree."""
    names = ("num_hash_layers", "n_hash_layers")
    types = keys.list_of("mlp_layer_types", *_names_of(_ROUTER_OF_TYPE))
    by_type = _kinds_of_types(keys, "mlp_layer_types", types, _ROUTER_OF_TYPE, num_layers)
    if not keys.has(*names):
        if not keys.has("mlp_layer_types"):
            keys.missing((*names, "mlp_layer_types"))
        return by_type
    num_hash = keys.integer(*names)
    if num_hash is None:
        return None
    if not 0 <= num_hash <= num_layers:
        keys.problems.append(f"num_hash_layers={num_hash} must lie in 0 .. num_hidden_layers={num_layers}")
        return None
    by_count = ("hash",) * num_hash + ("learned",) * (num_layers - num_hash)
    if by_type is not None and by_type != by_count:
        keys.problems.append(
            f"num_hash_layers={num_hash} but mlp_layer_types names"
            f" {by_type.count('hash')} hash_moe layers at other places: they must agree"
        )
        return None
    return by_count


def read_rope(keys: Keys, *, head_dim: object) -> dict[str, object]:
    """The fields `rope_theta`, `compress_rope_theta`, `yarn`, `qk_rope_head_dim`.

    Args:
        keys: the whole configuration.
        head_dim: Dh if it could be read; needed to interpret `partial_rotary_factor`.
    """
    main, compress, yarn_blocks = _rope_blocks(keys)
    thetas = {}
    for name, block in (("rope_theta", main), ("compress_rope_theta", compress)):
        stated = {}
        if keys.has(name):
            stated[name] = keys.real(name)
        if block is not None and block.has("rope_theta"):
            stated[f"{block.where}rope_theta"] = block.real("rope_theta")
        if not stated:
            keys.missing((name,))
        thetas[name] = _agreed(keys, stated)
    yarns = {block.where.rstrip("."): _read_yarn(block) for block in yarn_blocks}
    if not yarns:
        keys.problems.append(
            "the YaRN block is missing: give rope_scaling or rope_parameters.compress;"
            " compressed layers without YaRN are not DeepSeek-V4"
        )
    return thetas | {
        "yarn": _agreed(keys, yarns),
        "qk_rope_head_dim": _read_rotary_dim(keys, [main, *yarn_blocks], head_dim),
    }


def _rope_blocks(keys: Keys) -> tuple[Keys | None, Keys | None, list[Keys]]:
    """(main, compress, every block that states YaRN), whichever spelling the file uses."""
    yarn_blocks = []
    scaling = keys.block("rope_scaling")
    if scaling is not None:
        yarn_blocks.append(scaling)
    parameters = keys.block("rope_parameters")
    main = compress = None
    if parameters is not None:
        main, compress = parameters.block("main"), parameters.block("compress")
        if parameters.has("main", "compress"):
            if compress is not None:
                yarn_blocks.append(compress)
            if main is not None:
                _check_plain_rope(main)
        else:  # flat: the YaRN block itself, with the window layers' theta beside it
            main = parameters
            yarn_blocks.append(parameters)
    if keys.has("rope_factor", "original_seq_len"):  # inference/config.json
        flat = {
            "type": "yarn",
            "factor": keys.raw.get("rope_factor"),
            "original_max_position_embeddings": keys.raw.get("original_seq_len"),
            "beta_fast": keys.raw.get("beta_fast"),
            "beta_slow": keys.raw.get("beta_slow"),
        }
        yarn_blocks.append(Keys(flat, keys.problems, "YaRN (rope_factor, original_seq_len): "))
    return main, compress, yarn_blocks


def _check_plain_rope(block: Keys) -> None:
    block.fixed(("rope_type", "type"), "default")
    for name in sorted(set(block.raw) - _ROPE_KEYS):
        if block.has(name):
            block.complain(name, block.raw[name], "absent: window layers use plain RoPE")


def _read_yarn(block: Keys) -> Yarn | None:
    block.fixed(("rope_type", "type"), "yarn", required=True)
    # Left to its own rule, YaRN would scale cos and sin by 0.1 ln(factor) + 1; V4 never does.
    block.fixed(("attention_factor",), 1.0)
    for name in sorted(set(block.raw) - _ROPE_KEYS - _YARN_KEYS):
        if block.has(name):
            block.complain(name, block.raw[name], "absent: not a YaRN key of DeepSeek-V4")
    values = (
        block.real("factor"),
        block.real("beta_fast"),
        block.real("beta_slow"),
        block.integer("original_max_position_embeddings"),
    )
    return None if None in values else Yarn(*values)


def _read_rotary_dim(keys: Keys, blocks: list[Keys | None], head_dim: object) -> int | None:
    """Dr, from `qk_rope_head_dim` and every `partial_rotary_factor` (= Dr / Dh) that is present."""
    stated: dict[str, int | None] = {}
    for name in ("qk_rope_head_dim", "rope_head_dim"):
        if keys.has(name):
            stated[name] = keys.integer(name)
    for block in [keys, *blocks]:
        if block is None or not block.has("partial_rotary_factor"):
            continue
        label = f"{block.where}partial_rotary_factor * head_dim"
        factor = block.real("partial_rotary_factor")
        if factor is None or not isinstance(head_dim, int):
            stated[label] = None
            continue
        width = factor * head_dim
        stated[label] = round(width) if abs(width) < rules.MAX_DIM else None
        if stated[label] is None or abs(width - round(width)) > 1e-6 * max(head_dim, 1):
            block.complain("partial_rotary_factor", factor, f"n / head_dim ({head_dim})")
            stated[label] = None
    if not stated:
        keys.missing(("qk_rope_head_dim", "partial_rotary_factor"))
    return _agreed(keys, stated)


def _agreed(keys: Keys, stated: Mapping[str, object]) -> object:
    """The one value that all places state, or None with a problem."""
    values = list(stated.values())
    if not values or None in values:
        return None
    if any(value != values[0] for value in values):
        said = " but ".join(f"{name}={value!r}" for name, value in stated.items())
        keys.problems.append(f"{said}: they must agree")
        return None
    return values[0]


def _names_of(known: Mapping[str, str]) -> tuple[Callable[[object], bool], str]:
    """Arguments of `Keys.list_of` for a list of such names."""
    return (lambda item: isinstance(item, str) and item in known), "one of " + ", ".join(known)
