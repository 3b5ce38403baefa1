"""What an answer cost, in OpenAI's and DeepSeek's words, and in Anthropic's."""

from typing import Any


def usage(prompt_tokens: int, completion_tokens: int, cached: int, reasoning: int | None = None) -> Any:
    """The `usage` object of a response.

    Args:
        prompt_tokens: of all prompts. completion_tokens: of all answers.
        cached: prompt tokens that were known.
        reasoning: of the answers; None: this kind of answer has none.
    """
    found: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt_tokens - cached,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return found


def message_usage(prompt_tokens: int, answer_tokens: int, cached: int) -> dict[str, int]:
    """The `usage` object of a message: its `input_tokens` are those that were not known.

    Args:
        prompt_tokens: of the prompt. answer_tokens: drawn so far. cached: prompt tokens that were known.
    """
    return {
        "input_tokens": prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": answer_tokens,
    }
