"""`load`: from a checkpoint folder to a model that runs."""

import dataclasses
import logging
from pathlib import Path
from typing import Literal

from dsv4_jax.checkpoint.files import Progress
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.placing import MeshLike, RulesLike, placement_of
from dsv4_jax.refusing import refused_together

LOGGER = logging.getLogger(__name__)


def load(
    path: str | Path,
    dtype: str = "bfloat16",
    numerics: str = "reference",
    *,
    weights: Literal["native", "dequantized"] = "native",
    kernels: str = "xla",
    cache: str = "plain",
    draft_head: Literal["load", "ignore"] = "load",
    text_only: bool = False,
    tokenizer: Literal["read", "ignore"] = "read",
    allow_links: str | Path | None = None,
    mesh: MeshLike | None = None,
    rules: RulesLike | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Loads any supported checkpoint folder: official or transformers layout, plain or quantised.

    With several processes (`sharding.processes`) each reads what its own devices will hold, from a folder of
    the same content; what one of them refuses, all refuse.

    Args:
        path: folder with config.json and safetensors files.
        dtype: of parameters, activations and cache: "bfloat16" or "float32".
        weights: "native" keeps FP8 and FP4 weights as they are stored and decodes them where they are used;
            "dequantized" makes them arrays of `dtype`, 2 to 8 times as large. The numbers are the same.
        numerics: "reference", or "qat" for the official quantisation simulation (`numerics.qat.SWITCHES`).
        kernels: "xla", "pallas" (TPU) or "pallas-interpret" (see `numerics.policy.KERNELS`).
        cache: how the cache keeps its rows: "plain", "fp8+fp8" or "fp8+mxfp4" (`numerics.cache_formats`).
        draft_head: "ignore" leaves a DSpark draft head out.
        text_only: load the text model of a vision variant.
        tokenizer: "ignore" opens no tokenizer.json; the model takes token ids only and saves no tokenizer.
        allow_links: a folder that links may lead into, besides the folder itself and its hub cache.
        mesh: devices to spread the model over, as "expert=8,tensor=2" or a `jax.sharding.Mesh` with axes of
            `sharding.mesh`; None: the default device. It changes where numbers are, and the order of sums.
        rules: which dims are split over which axes: the name of a table of `sharding.rules` ("decode" by
            default, "prefill", "train"), or rules for the parameters' letters such as {"E": "expert"}.
        progress: called after each tensor with (its name, bytes read, bytes of all tensors).

    Raises:
        ProblemsError: a mesh that cannot be, or rules that do not fit it or the parameters, all problems at
            once.
        CheckpointError, ConfigError: with every problem found; nothing is left half loaded.
    """
    policy = Policy.of(dtype, numerics, kernels=kernels, cache=cache)
    accepted = {"draft_head": draft_head, "text_only": text_only, "allow_links": allow_links}
    placement = placement_of(mesh, rules)
    where = {} if placement is None else {"mesh": placement.mesh, "rules": placement.table.parameters}
    how = {"weights": weights, "tokenizer": tokenizer, "progress": progress, **accepted, **where}
    loaded = refused_together(lambda: load_checkpoint(Path(path), policy, **how))
    for warning in loaded.warnings:
        LOGGER.warning("%s: %s", path, warning)
    if loaded.experts_in_fp4:
        # On their grid already: rounding them again in every step would change nothing.
        policy = dataclasses.replace(policy, switches=policy.switches - {"expert_fp4"})
    held = (loaded.tokenizer, loaded.stored, loaded.side_files)
    return LanguageModel(loaded.config, policy, loaded.parameters, *held, placement=placement)
