"""Sizes of an engine."""

import dataclasses
from pathlib import Path

from dsv4_jax.config import ModelConfig
from dsv4_jax.inference.drafters import Draft, draft_problem, most_drafts, widths_for


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine, fixed when it starts.

    Memory: `num_slots + num_lanes` rows of `max_length` tokens, `num_pages` blocks and `num_states` states.

    A step that verifies more drafts computes in other shapes, and may round otherwise. In float32 no token
    was ever seen to change by that. In bfloat16 two logits that are nearly equal can change places, and which
    width a step has depends on measured times. One width, as in `draft_widths=(5,)`, makes the tokens of a
    request in bfloat16 the same in every run and company again.
    """

    max_length: int = 4096  # tokens of a prompt and its answer
    num_slots: int = 8  # answers at once
    num_lanes: int = 2  # prompts computed at once
    chunk: int | None = None  # prompt tokens of a lane a step, and the granularity of prefix hits; None: 128
    num_pages: int = 256  # blocks of prefixes that are kept; 0: no prefix cache
    num_states: int = 32
    state_interval: int = 4096  # tokens between the states kept along a long prompt
    draft: Draft | None = None  # who guesses further tokens: "mtp", "dspark" or "lookup"
    draft_widths: tuple[int, ...] | None = None  # drafts that a step may verify; None: `drafters.widths_for`
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
        elif self.draft_widths is not None:
            most = 0 if self.draft is None else most_drafts(self.draft, config)
            widths = list(self.draft_widths)
            if not widths or widths != sorted(set(widths)) or widths[0] < 0 or widths[-1] > most:
                found.append(
                    f"draft_widths={self.draft_widths} must be ascending numbers in 0..{most}"
                    f" for draft={self.draft!r}"
                )
        return found

    def widths(self, config: ModelConfig) -> tuple[int, ...]:
        """Drafts that a step may verify, ascending."""
        return widths_for(self.draft, config) if self.draft_widths is None else self.draft_widths
