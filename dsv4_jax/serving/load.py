"""A load for an engine: requests that arrive as clients send them, and what each of them saw.

Times are a client's: from the moment a request is sent to the moments its tokens arrive.
"""

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.engine import Engine
from dsv4_jax.serving.requests import Output, Sampling

Generate = Callable[[list[int], Sampling], AsyncIterator[Output]]


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent. Prompts are random ids, drawn from `seed`; answers always have their full length."""

    num_requests: int = 32
    prompt_tokens: int = 96  # on average; each has half to three halves of it
    answer_tokens: int = 32
    shared_tokens: int = 0  # that every prompt begins with
    at_once: int | None = 8  # so many clients, each sends when it has its answer
    per_second: float | None = None  # or: arrivals of a Poisson process, however many wait
    cancelled: float = 0.0  # share of requests whose client leaves in the middle
    temperature: float = 1.0
    seed: int = 0

    def problems(self, max_length: int) -> list[str]:
        """Every broken rule, for an engine of such a length."""
        found = []
        for name, least in (
            ("num_requests", 1), ("prompt_tokens", 1), ("answer_tokens", 1), ("shared_tokens", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)} must be at least {least}")
        if (self.at_once is None) == (self.per_second is None):
            found.append(
                f"one of at_once={self.at_once} and per_second={self.per_second} must be given, not both"
            )
        elif (self.at_once or self.per_second or 0) <= 0:
            found.append(f"at_once={self.at_once}, per_second={self.per_second}: must be above 0")
        if not 0 <= self.cancelled <= 1:
            found.append(f"cancelled={self.cancelled} must be in 0..1")
        longest = self.shared_tokens + self.prompt_tokens * 3 // 2 + self.answer_tokens + 1
        if longest > max_length:
            found.append(f"prompts and answers have up to {longest} tokens, the engine takes {max_length}")
        return found


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one client saw, in seconds since the load began."""

    sent: float
    arrived: tuple[float, ...]  # of each token
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str | None  # None: the client left

    @property
    def first_token_seconds(self) -> float:
        """From sending to the first token."""
        return self.arrived[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens that follow each other."""
        return [b - a for a, b in zip(self.arrived, self.arrived[1:], strict=False)]


def run(engine: Engine, load: Load) -> tuple[list[Seen], float]:
    """Sends a load and waits for its end: what each client saw, and the seconds it took.

    Raises:
        ProblemsError: for a load that the engine cannot take.
    """
    if problems := load.problems(engine.settings.max_length):
        raise ProblemsError("this load cannot be sent", problems)
    return asyncio.run(send(engine.generate, engine.lm.config.vocab_size, load))


async def send(generate: Generate, vocab_size: int, load: Load) -> tuple[list[Seen], float]:
    """Sends a load and waits for its end, as `run`.

    Args:
        generate: serves one request, as `Engine.generate`: yields what comes, and may be left.
        vocab_size: V, of the ids of prompts. load: what is sent; the caller has checked that it fits.
    """
    generator = np.random.default_rng(load.seed)
    shared = generator.integers(0, vocab_size, load.shared_tokens).tolist()
    low, high = load.prompt_tokens - load.prompt_tokens // 2, load.prompt_tokens * 3 // 2
    requests = []
    for number in range(load.num_requests):
        own = generator.integers(0, vocab_size, int(generator.integers(low, high + 1))).tolist()
        leaves = generator.random() < load.cancelled
        after = int(generator.integers(1, load.answer_tokens + 1)) if leaves else None
        requests.append(([*shared, *own], number, after))
    start = time.monotonic()

    async def one(prompt: list[int], number: int, leaves_after: int | None) -> Seen:
        sampling = Sampling(
            max_tokens=load.answer_tokens, temperature=load.temperature, seed=number, ignore_eos=True
        )
        sent, arrived, cached, reason = time.monotonic() - start, [], 0, None
        stream = generate(prompt, sampling)
        try:
            async for output in stream:
                arrived += [time.monotonic() - start] * len(output.token_ids)
                cached, reason = max(cached, output.cached_tokens), output.finish_reason
                if leaves_after is not None and len(arrived) >= leaves_after:
                    break
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        return Seen(sent, tuple(arrived), len(prompt), cached, reason)

    if load.per_second is not None:
        tasks = []
        for request in requests:
            tasks.append(asyncio.create_task(one(*request)))
            await asyncio.sleep(float(generator.exponential(1.0 / load.per_second)))
        seen = await asyncio.gather(*tasks)
    else:
        queue = iter(requests)

        async def client() -> list[Seen]:
            return [await one(*request) for request in queue]

        seen = sum(await asyncio.gather(*(client() for _ in range(load.at_once or 1))), [])
    return list(seen), time.monotonic() - start


def percentile(values: Sequence[float], percent: float) -> float:
    """NaN of nothing."""
    return float(np.percentile(values, percent)) if len(values) else math.nan


def summary(seen: Sequence[Seen], seconds: float) -> dict[str, float]:
    """The usual numbers of a load: tokens a second, latencies in milliseconds, and tokens that were known."""
    first = [1e3 * one.first_token_seconds for one in seen if one.arrived]
    gaps = [1e3 * gap for one in seen for gap in one.gaps]
    whole = [1e3 * (one.arrived[-1] - one.sent) for one in seen if one.finish_reason == "length"]
    prompts = sum(one.prompt_tokens for one in seen)
    found = {
        "requests": len(seen),
        "seconds": seconds,
        "output_tokens_per_second": sum(len(one.arrived) for one in seen) / seconds,
        "prompt_tokens_per_second": prompts / seconds,
        "prefix_hit_share": sum(one.cached_tokens for one in seen) / max(prompts, 1),
        "left_early": sum(one.finish_reason is None for one in seen),
    }
    for name, values in (("first_token_ms", first), ("token_gap_ms", gaps), ("whole_answer_ms", whole)):
        for percent in (50, 90, 99):
            found[f"{name}_p{percent}"] = percentile(values, percent)
    return found
