"""What a training run costs, from shapes: FLOPs of a token, bytes of a device."""

import dataclasses
import math

import jax

from dsv4_jax.config import ModelConfig
from dsv4_jax.inspection.costs import count_mtp, count_parameters
from dsv4_jax.inspection.spread import described_placement, parameter_rows
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.chips import CHIPS
from sharding.dispatch_cost import link_of
from sharding.rules import TRAIN

GPU_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}
"""bf16 FLOPs a second without sparsity, by a part of what the device is called; the vendor's figures."""

FORWARD_AND_BACKWARD = 3
"""FLOPs of a training step over those of its forward pass; recomputation is not counted."""


def flops_per_token(config: ModelConfig, seq_len: int, *, dense: bool = False) -> float:
    """Model FLOPs of one token of a training step, forward and backward, of a row of `seq_len` tokens.

    Two for each active parameter that multiplies and each product of attention, the MTP block included; what
    is computed again, and what is computed in blocks and masked away, does not count.

    Args:
        config: of the model.
        seq_len: T.
        dense: CSA attends to every visible entry and has no indexer.
    """
    flops = 2.0 * (count_parameters(config).active + count_mtp(config)[1])
    mean = seq_len / 2  # tokens before a token
    window = min(config.sliding_window, mean)
    for kind in (*config.attention_kinds, *("window",) * config.num_nextn_predict_layers):
        seen = window
        if kind != "window":
            entries = mean / config.ratio(kind)
            seen += entries if kind == "hca" or dense else min(entries, config.index_topk)
            if kind == "csa" and not dense:
                flops += 2 * config.index_n_heads * config.index_head_dim * entries
        flops += 4 * config.num_attention_heads * config.head_dim * seen
    if config.num_nextn_predict_layers:  # a second product with the head
        flops += 2 * config.vocab_size * config.hidden_size
    return FORWARD_AND_BACKWARD * flops


def peak_flops(device: jax.Device) -> float | None:
    """bf16 FLOPs a second of a device; None where nobody says, as of a CPU."""
    if device.platform == "tpu":
        chip = CHIPS.get(link_of("tpu", device.device_kind))
        return None if chip is None else chip.bf16_flops
    return next((peak for name, peak in GPU_PEAKS.items() if name in device.device_kind), None)


@dataclasses.dataclass(frozen=True)
class TrainingBytes:
    """Bytes that one device holds while it trains, as far as shapes tell.

    Attributes:
        parameters: the masters.
        moments: of the optimizer.
        gradients: as large as what is trained.
        streams: residual streams between layers, which the backward pass needs; what else it keeps depends
            on the compiler and on `Policy.remat`, and comes on top.
    """

    parameters: int
    moments: int
    gradients: int
    streams: int

    @property
    def total(self) -> int:
        """At least so much."""
        return self.parameters + self.moments + self.gradients + self.streams


def training_bytes(
    config: ModelConfig, policy: Policy, moments_share: float, mesh: str, rows: int, seq_len: int
) -> TrainingBytes:
    """What a device holds of a run on a mesh of devices that nobody needs to have.

    Args:
        config: of the model.
        policy: dtypes.
        moments_share: bytes of the optimizer's moments over bytes of the parameters; moments lie where their
            parameters do.
        mesh: a spelling, "fsdp=4,expert=2".
        rows: B of a batch, or of one part of it that is accumulated.
        seq_len: T.

    Raises:
        ProblemsError: for a mesh that cannot be, or that does not fit the parameters.
    """
    placement = described_placement(mesh, TRAIN)
    held = parameter_rows(config, placement, policy.param_dtype.name)
    every = sum(row.bytes_a_device for row in held)
    devices = math.prod(placement.mesh.shape.values())
    layers = config.num_hidden_layers + 1
    elements = rows * seq_len * config.hc_mult * config.hidden_size * layers
    streams = math.ceil(elements * policy.compute_dtype.itemsize / devices)
    return TrainingBytes(every, round(every * moments_share), every, streams)
