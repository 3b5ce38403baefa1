"""The DeepSeek-V4 network in Flax NNX, one idea a file, in the report's words."""
