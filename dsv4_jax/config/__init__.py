"""What a checkpoint says about its model: one frozen `ModelConfig`, presets, and the layer plan.

Dimension legend of the whole repository (values: Flash / Pro):

    B   batch rows                       T   tokens in this call
    L   layers, 43 / 61                  R   repeats of a scanned unit (leading parameter axis)
    N   residual streams, 4              D   hidden size, 4096 / 7168
    V   vocabulary, 129280               W   sliding window, 128
    H   query heads, 64 / 128            Dh  head width, 512        Dr  rotary width (last), 64
    G   output groups, 8 / 16            J   heads in a group, H / G
    Q   query latent rank, 1024 / 1536   O   output rank of a group, 1024
    m   compression ratio, 4 / 128       w   compressor branches: 2 (CSA) or 1 (HCA)
    S   compressed entries               Dc  compressor width, Dh or Di
    Hi  indexer heads, 64                Di  indexer head width, 128
    Ki  indexer top-k, 512 / 1024        E   routed experts, 256 / 384
    Ke  active experts, 6                F   expert width, 2048 / 3072
    C   layers that DSpark reads, 3      Mr  Markov rank of DSpark, 256 / 512
    K   DSpark's block size, 5           Dm  what its confidence head reads, D + Mr
"""

from dsv4_jax.config.kinds import DSPARK_STAGES as DSPARK_STAGES
from dsv4_jax.config.kinds import AttentionKind as AttentionKind
from dsv4_jax.config.kinds import DSpark as DSpark
from dsv4_jax.config.kinds import RouterKind as RouterKind
from dsv4_jax.config.kinds import Yarn as Yarn
from dsv4_jax.config.layer_stacks import LayerStack as LayerStack
from dsv4_jax.config.layer_stacks import layer_stacks as layer_stacks
from dsv4_jax.config.model_config import ModelConfig as ModelConfig
from dsv4_jax.config.presets import tiny as tiny
from dsv4_jax.config.presets import v4_flash as v4_flash
from dsv4_jax.config.presets import v4_pro as v4_pro
