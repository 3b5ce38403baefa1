"""A picture of a finished run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsv4_jax.training.step import StepReport


def save_loss_curve(
    path: Path, reports: Sequence[StepReport], unigram: float, validation: float | None
) -> None:
    """Writes a PNG with the losses of every step and, as lines, the unigram model's and the validation loss.

    Args:
        path: of the PNG.
        reports: of each step, in order.
        unigram: nats per token on the validation tokens.
        validation: of the trained model on the same tokens, or None.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(reports) + 1)
    further, main = [report.mtp for report in reports], [report.main for report in reports]
    axes.plot(steps, further, lw=0.8, color="tab:orange", label="two tokens ahead (MTP)")
    axes.plot(steps, main, lw=1.2, color="tab:blue", label="next token")
    axes.axhline(unigram, color="gray", ls="--", lw=1, label=f"unigram model, validation {unigram:.2f}")
    if validation is not None:
        label = f"this model, validation {validation:.2f}"
        axes.axhline(validation, color="tab:green", lw=1, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="DeepSeek-V4 quickstart")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
