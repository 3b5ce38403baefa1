"""Every limit of the server, in one place. A request beyond one is refused before it costs anything."""

import dataclasses

MiB = 1 << 20

MAX_JSON_DEPTH = 64
MAX_JSON_ITEMS = 4_000_000
MAX_HEADER_BYTES = 64 * 1024
MAX_STRING_CHARS = 512
"""Of short texts that only name something, such as `user`."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one server accepts."""

    body_bytes: int = 64 * MiB
    all_bodies_bytes: int = 512 * MiB  # of requests that are being read or answered at once
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    keep_alive_seconds: float = 5.0
    queue_seconds: float = 300.0  # until the first token
    request_seconds: float | None = None  # of a whole request; None: no limit
    event_seconds: float = 10.0  # a stream that is silent for so long gets a comment
    backlog: int = 4096  # outputs that a stream's reader may be behind
    max_tokens: int | None = None  # of an answer whose request says nothing; None: all that fits
    most_choices: int = 128  # prompts times n of one request
    logprob_budget: int = 262_144  # of a request: tokens times log-probabilities each
    waiting: int = 512  # requests that may wait
    waiting_contexts: int = 4  # prompt tokens that may wait, as multiples of the longest sequence
    requests: int = 4096  # that are open at once, whatever they ask for

    def problems(self) -> list[str]:
        """Broken rules."""
        return [
            f"{field.name}={getattr(self, field.name)!r} must be greater than 0"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None and value <= 0
        ]
