"""Serving: how requests of clients become prompts, and tokens become answers."""
