"""The chat format of DeepSeek-V4: messages to token ids, and generated tokens back to messages."""
