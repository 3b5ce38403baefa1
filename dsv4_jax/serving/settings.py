"""Sizes of an engine."""

import dataclasses
from pathlib import Path

from dsv4_jax.config import ModelConfig
from dsv4_jax.inference.drafters import Draft, draft_problem


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine, fixed when it starts.

    Memory: `num_slots + num_lanes` rows of `max_length` tokens, `num_pages` blocks and `num_states` states.
    """

    max_length: int = 4096  # tokens of a prompt and its answer
    num_slots: int = 8  # answers at once
    num_lanes: int = 2  # prompts computed at once
    chunk: int | None = None  # prompt tokens of a lane a step, and the granularity of prefix hits; None: 128
    num_pages: int = 256  # blocks of prefixes that are kept; 0: no prefix cache
    num_states: int = 32
    state_interval: int = 4096  # tokens between the states kept along a long prompt
    draft: Draft | None = None  # who guesses further tokens: "mtp", "dspark" or "lookup"
    disk: Path | None = None  # folder for prefixes that outlive their pages, and the engine; None: none do
    disk_bytes: int = 8 << 30  # of all its files

    def problems(self, smallest: int, config: ModelConfig) -> list[str]:
        """Broken rules for a model, whose smallest block has `smallest` tokens."""
        found = [
            f"{name}={getattr(self, name)!r} must be at least {least}"
            for name, least in (
                ("max_length", 2), ("num_slots", 1), ("num_lanes", 1), ("num_pages", 0), ("num_states", 0),
                ("state_interval", 1),
            )
            if getattr(self, name) < least
        ]  # fmt: skip
        if self.chunk is not None and (self.chunk < 1 or self.chunk % smallest):
            found.append(f"chunk={self.chunk} must be a multiple of {smallest} tokens for this model")
        if problem := draft_problem(self.draft, config):
            found.append(problem)
        return found
