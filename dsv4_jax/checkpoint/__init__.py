"""Checkpoints on disk: the only code that knows tensor names, safetensors bytes and shard files."""
