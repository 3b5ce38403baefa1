"""Errors that state every problem at once."""

from collections.abc import Sequence

SHOWN_PROBLEMS = 20


class ProblemsError(ValueError):
    """A refusal with the list of all its reasons.

    Args:
        what: one sentence saying what was refused.
        problems: every broken rule, each with the offending value; the message shows the first 20.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.what = what
        self.problems = tuple(problems)
        lines = [f"{what}: {len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"]
        lines += [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  ... and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))


class ConfigError(ProblemsError):
    """A model configuration that contradicts itself, is incomplete, or is not supported."""


class CheckpointError(ProblemsError):
    """A checkpoint that cannot be read in full and exactly; nothing of it was loaded."""
