"""What a server will hold, computed from shapes before anything is loaded, and what would fit instead."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_jax.errors import ProblemsError

if TYPE_CHECKING:
    from dsv4_jax.config import ModelConfig
    from dsv4_jax.serving.settings import EngineSettings

GiB = 1 << 30
USABLE = 0.95
"""Share of the free memory that a plan may take."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a server on one device: of a mesh, on each.

    Attributes:
        weights: of the checkpoint's files. row: of the cache of one sequence. num_rows: of slots, lanes and
            the scores of prompts. prefixes: of the prefix cache. logits: of slots and lanes.
    """

    weights: int
    row: int
    num_rows: int
    prefixes: int
    logits: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.weights + self.row * self.num_rows + self.prefixes + self.logits

    def line(self) -> str:
        """One line for the operator."""
        parts = {
            "weights": self.weights,
            f"{self.num_rows} rows": self.row * self.num_rows,
            "prefixes": self.prefixes,
            "logits": self.logits,
        }
        shown = ", ".join(f"{name} {size / GiB:.2f}" for name, size in parts.items())
        return f"memory plan: {shown}, together {self.total / GiB:.2f} GiB"


def memory_plan(
    directory: Path,
    config: "ModelConfig",
    settings: "EngineSettings",
    dtype: str,
    cache: str,
    mesh: str | None = None,
) -> MemoryPlan:
    """The plan of a server. Compiled programs and intermediate values come on top.

    Args:
        directory: of the checkpoint. config: of its model. settings: of the engine.
        dtype: of activations and a plain cache. cache: format of the cache.
        mesh: that it is spread over; None: one device.

    Raises:
        ProblemsError: for a mesh that cannot be or does not fit the model or the slots.
    """
    from dsv4_jax.inspection import costs
    from dsv4_jax.model.cache_blocks import block_length
    from dsv4_jax.model.geometry import allocated_length

    length = allocated_length(config, settings.max_length)
    row = costs.allocated_bytes(config, length, dtype, cache)
    smallest = block_length(config)
    block = settings.chunk or -(-128 // smallest) * smallest
    state = costs.state_bytes(config)
    states = settings.num_states * sum(dataclasses.astuple(state))
    of_weights, of_rows = (1.0, 1.0) if mesh is None else _shares(config, settings, mesh)
    return MemoryPlan(
        weights=int(of_weights * sum(file.stat().st_size for file in directory.glob("*.safetensors"))),
        row=int(of_rows * row),
        num_rows=settings.num_slots + settings.num_lanes + 1,
        prefixes=row * settings.num_pages * block // length + states,
        logits=2 * (settings.num_slots + settings.num_lanes) * config.vocab_size * 4,
    )


def _shares(config: "ModelConfig", settings: "EngineSettings", mesh: str) -> tuple[float, float]:
    """(share of the weights, share of the rows of slots) that each device of a mesh holds."""
    from dsv4_jax.inspection.spread import spread

    held = spread(config, mesh, "decode", "native", settings.num_slots, settings.max_length, "plain")
    return tuple(
        sum(each.bytes_a_device for each in arrays)
        / sum(each.bytes_a_device * held.num_devices / each.copies for each in arrays)
        for arrays in (held.parameters, held.cache)
    )


def free_memory(mesh: str | None = None) -> int | None:
    """Bytes that the first device, or this machine, has to give; None if nobody knows.

    Devices of a mesh that are no devices of their own (of a CPU) share what the machine has.
    """
    import math

    import jax

    from sharding.mesh import parse

    sharers = 1 if mesh is None else math.prod(parse(mesh).values())

    numbers = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in numbers:
        return numbers["bytes_limit"] - numbers.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharers
    except (AttributeError, OSError, ValueError):
        return None


def check_plan(plan: MemoryPlan, free: int | None, settings: "EngineSettings") -> None:
    """Raises ProblemsError if a plan does not fit, with what would."""
    room = None if free is None else int(USABLE * free)
    if room is None or plan.total <= room:
        return
    problem = f"{plan.line()}; {free / GiB:.2f} GiB are free"
    left = room - plan.weights
    if left <= 0:
        problem += ": the weights alone do not fit"
    else:
        per_slot = plan.row + plan.logits // (settings.num_slots + settings.num_lanes)
        fixed = plan.row * (settings.num_lanes + 1)
        slots = (left - fixed) // per_slot
        if slots >= 1:
            problem += f": --slots {slots} --prefix-blocks 0 would fit"
        else:
            shorter = int(settings.max_length * left / max(1, plan.total - plan.weights))
            problem += f": sequences of about {max(1, shorter)} tokens would fit (--max-length)"
    raise ProblemsError("this does not fit into memory", [problem])
