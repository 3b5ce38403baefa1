"""The server: OpenAI's and Anthropic's endpoints over an engine. Needs the extra `serve`."""
