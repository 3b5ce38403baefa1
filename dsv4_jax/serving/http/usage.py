"""What an answer cost, in OpenAI's and DeepSeek's words."""

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
