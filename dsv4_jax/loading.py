"""`load`: from a checkpoint folder to a model that runs."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax

from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy

LOGGER = logging.getLogger(__name__)


def load(
    path: str | Path,
    dtype: str = "bfloat16",
    numerics: str = "reference",
    *,
    weights: Literal["native", "dequantized"] = "native",
    kernels: str = "xla",
    cache: str = "plain",
    draft_head: Literal["refuse", "ignore"] = "refuse",
    text_only: bool = False,
    tokenizer: Literal["read", "ignore"] = "read",
    allow_links: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str | tuple[str, ...]] | None = None,
) -> LanguageModel:
    """Loads any supported checkpoint folder: official or transformers layout, plain or quantised.

    Args:
        path: folder with config.json and safetensors files.
        dtype: of parameters, activations and cache: "bfloat16" or "float32".
        weights: "native" keeps FP8 and FP4 weights as they are stored and decodes them where they are used;
            "dequantized" makes them arrays of `dtype`, 2 to 8 times as large. The numbers are the same.
        numerics: "reference", or "qat" for the official quantisation simulation (`numerics.qat.SWITCHES`).
        kernels: "xla", "pallas" (TPU) or "pallas-interpret" (see `numerics.policy.KERNELS`).
        cache: how the cache keeps its rows: "plain", "fp8+fp8" or "fp8+mxfp4" (`numerics.cache_formats`).
        draft_head: "ignore" loads the backbone of a checkpoint with a DSpark draft head, without it.
        text_only: load the text model of a vision variant.
        tokenizer: "ignore" opens no tokenizer.json; the model takes token ids only and saves no tokenizer.
        allow_links: a folder that links may lead into, besides the folder itself and its hub cache.
        mesh: devices to place the parameters on; None: the default device.
        rules: letter of a dim (`dsv4_jax.parameters`) -> axes of the mesh that it is split over, such as
            {"E": "expert"}; dims without a rule are whole on every device.

    Raises:
        ProblemsError: rules that do not fit the mesh or the parameters, all of them at once.
        CheckpointError, ConfigError: with every problem found; nothing is left half loaded.
    """
    policy = Policy.of(dtype, numerics, kernels=kernels, cache=cache)
    accepted = {"draft_head": draft_head, "text_only": text_only, "allow_links": allow_links}
    where = {"mesh": mesh, "rules": rules}
    loaded = load_checkpoint(Path(path), policy, weights=weights, tokenizer=tokenizer, **accepted, **where)
    for warning in loaded.warnings:
        LOGGER.warning("%s: %s", path, warning)
    if loaded.experts_in_fp4:
        # On their grid already: rounding them again in every step would change nothing.
        policy = dataclasses.replace(policy, switches=policy.switches - {"expert_fp4"})
    held = (loaded.tokenizer, loaded.stored, loaded.side_files)
    return LanguageModel(loaded.config, policy, loaded.parameters, *held)
