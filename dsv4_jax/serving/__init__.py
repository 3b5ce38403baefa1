"""Serving: many requests at once from one model, in the chat format of the official releases."""
