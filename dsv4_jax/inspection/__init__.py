"""What a person asks of a model: its parameters, bytes and costs, and what was found in a checkpoint."""
