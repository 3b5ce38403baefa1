"""Training: data, losses, optimiser, step and loop, and the quickstart that uses them all."""
