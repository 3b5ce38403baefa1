"""Where arrays live. Parameters already carry their logical dim names (`dims`)."""
