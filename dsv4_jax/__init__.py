"""DeepSeek-V4 in JAX: load a checkpoint, run it, train it."""

from dsv4_jax.config import ModelConfig as ModelConfig
from dsv4_jax.config import tiny as tiny
from dsv4_jax.config import v4_flash as v4_flash
from dsv4_jax.config import v4_pro as v4_pro
from dsv4_jax.errors import CheckpointError as CheckpointError
from dsv4_jax.errors import ConfigError as ConfigError
from dsv4_jax.language_model import LanguageModel as LanguageModel
from dsv4_jax.language_model import load as load
from dsv4_jax.numerics.policy import Policy as Policy
