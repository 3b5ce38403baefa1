"""DeepSeek-V4 in JAX: load a checkpoint, run it, train it.

Names are imported when first used, so that `dsv4 --help` and reading a config do not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4_jax.config import ModelConfig as ModelConfig
    from dsv4_jax.config import tiny as tiny
    from dsv4_jax.config import v4_flash as v4_flash
    from dsv4_jax.config import v4_pro as v4_pro
    from dsv4_jax.errors import CheckpointError as CheckpointError
    from dsv4_jax.errors import ConfigError as ConfigError
    from dsv4_jax.language_model import LanguageModel as LanguageModel
    from dsv4_jax.loading import load as load
    from dsv4_jax.numerics.policy import Policy as Policy
    from dsv4_jax.training.gradients import joined as joined
    from dsv4_jax.training.gradients import trainable as trainable

_HOMES = {
    "ModelConfig": "config",
    "tiny": "config",
    "v4_flash": "config",
    "v4_pro": "config",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "joined": "training.gradients",
    "trainable": "training.gradients",
    "LanguageModel": "language_model",
    "load": "loading",
    "Policy": "numerics.policy",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
