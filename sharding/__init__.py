"""Where arrays live: meshes and rules. Parameters already carry their logical dim names (`dims`)."""
