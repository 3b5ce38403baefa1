"""What a request asks for and what comes back: the objects that the engine and a server share."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from dsv4_jax.config.quantities import integer_problem, is_bool, sampling_problems, seed_problem
from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.constraints import Grammar

MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_STOP_LENGTH = 256
MOST_STOP_TOKENS = 32
MOST_BIASES = 1024

FinishReason = Literal["stop", "length", "aborted", "error"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn; the defaults are those of the official generation_config.

    A request's tokens depend on its prompt, these numbers and its seed alone: not on what else is served.
    """

    max_tokens: int = 128
    temperature: float = 1.0  # 0: the likeliest token, the lowest id on a tie
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # share of the likeliest token's probability that a token must have
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: tuple[str, ...] = ()  # texts that end the answer, themselves left out
    stop_token_ids: tuple[int, ...] | None = None  # None: the model's own
    ignore_eos: bool = False  # never stop at the model's own stop tokens
    min_tokens: int = 0  # no stop token is drawn before so many tokens
    logprobs: int | None = None  # that many likeliest tokens a step, and the drawn one; None: none
    grammar: Grammar | None = None  # of the answer, which ends where the grammar may end

    def problems(self, vocab_size: int) -> list[str]:
        """Every rule that these values break, each naming the field and the value."""
        found = list(sampling_problems(self.temperature, self.top_p))
        for name, low, high in (
            ("max_tokens", 1, None),
            ("top_k", 0, None),
            ("min_tokens", 0, None),
        ):
            found.append(integer_problem(name, getattr(self, name), low, high))
        found.append(seed_problem(self.seed))
        if self.logprobs is not None:
            found.append(integer_problem("logprobs", self.logprobs, 0, MOST_LOGPROBS))
        for name, low, high in (
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.01, 100.0),
        ):
            found.append(_number_problem(name, getattr(self, name), low, high))
        found += self._bias_problems(vocab_size) + self._stop_problems(vocab_size)
        if not is_bool(self.ignore_eos):
            found.append(f"ignore_eos={self.ignore_eos!r} must be true or false")
        if self.grammar is not None:
            for name, neutral in (("ignore_eos", False), ("stop_token_ids", None), ("min_tokens", 0)):
                if getattr(self, name) != neutral:
                    found.append(f"{name}: a grammar decides where the answer ends, this cannot be kept, too")
        return [problem for problem in found if problem]

    def _bias_problems(self, vocab_size: int) -> list[str | None]:
        if not isinstance(self.logit_bias, Mapping):
            return [f"logit_bias={self.logit_bias!r} must map token ids to numbers"]
        found: list[str | None] = []
        if len(self.logit_bias) > MOST_BIASES:
            found.append(f"logit_bias has {len(self.logit_bias)} entries, at most {MOST_BIASES} are allowed")
        for token, bias in list(self.logit_bias.items())[:MOST_BIASES]:
            found.append(integer_problem("a token id of logit_bias", token, 0, vocab_size - 1))
            found.append(_number_problem(f"logit_bias[{token!r}]", bias, -100.0, 100.0))
        return found

    def _stop_problems(self, vocab_size: int) -> list[str | None]:
        found: list[str | None] = []
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            return [f"stop={self.stop!r} must be a list of texts"]
        if len(self.stop) > MOST_STOPS:
            found.append(f"stop has {len(self.stop)} texts, at most {MOST_STOPS} are allowed")
        for text in self.stop[:MOST_STOPS]:
            if not 1 <= len(text) <= MOST_STOP_LENGTH:
                found.append(
                    f"a stop text of {len(text)} characters must have 1 to {MOST_STOP_LENGTH} of them"
                )
        ids = self.stop_token_ids or ()
        if len(ids) > MOST_STOP_TOKENS:
            found.append(f"stop_token_ids has {len(ids)} ids, at most {MOST_STOP_TOKENS} are allowed")
        found += [integer_problem("a stop token id", token, 0, vocab_size - 1) for token in ids]
        return found


def _number_problem(name: str, value: Any, low: float, high: float) -> str | None:
    number = value if isinstance(value, int | float) and not is_bool(value) else None
    if number is None or not math.isfinite(number) or not low <= number <= high:
        return f"{name}={value!r} must be a number in {low:g}..{high:g}"
    return None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities of one drawn token, from the model's own distribution: before penalties, biases and
    temperature."""

    token_id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]  # (id, logprob), the likeliest first


@dataclasses.dataclass(frozen=True)
class Output:
    """What one step adds to one answer.

    `token_ids` are all drawn tokens, a stop token included; `text` is whole characters, without stop texts,
    stop tokens and other special tokens, and may come later than its tokens. `finish_reason` is None until
    the last one: "stop" (a stop token or text), "length", "aborted", or "error", with `error` saying why.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0  # of the prompt, that were not computed again
    queue_seconds: float | None = None  # with the first token: from arrival to a lane
    prefill_seconds: float | None = None  # with the first token: from the lane to it
    is_stuck: bool = False  # an error of the answer's grammar, not of the model


def checked_request(
    prompt_ids: tuple[int, ...],
    sampling: Sampling,
    own_stops: tuple[int, ...],
    has_text: bool,
    vocab_size: int,
    max_length: int,
) -> frozenset[int]:
    """The token ids that end a request, which is refused if the engine cannot serve it.

    Args:
        prompt_ids: of the prompt. sampling: how to draw.
        own_stops: of the model. has_text: whether it has a tokenizer.
        vocab_size: V. max_length: of a prompt and its answer.

    Raises:
        ProblemsError: with every problem.
    """
    problems = sampling.problems(vocab_size)
    if sampling.stop and not has_text:
        problems.append("stop texts need a tokenizer.json, which this model does not have")
    if not prompt_ids:
        problems.append("the prompt must have at least one token")
    bad = [token for token in prompt_ids if integer_problem("token", token, 0, vocab_size - 1)]
    if bad:
        problems.append(f"token ids {bad[:8]} of the prompt must be integers in 0..{vocab_size - 1}")
    needed = len(prompt_ids) + (sampling.max_tokens if isinstance(sampling.max_tokens, int) else 0)
    if needed > max_length:
        problems.append(
            f"{len(prompt_ids)} prompt tokens and max_tokens={sampling.max_tokens} are {needed}, "
            f"more than the {max_length} that a sequence may have here"
        )
    if sampling.grammar is not None and not own_stops:
        problems.append("a grammar ends by a stop token, and this model has none")
    if problems:
        raise ProblemsError("this request cannot be served", problems)
    own = frozenset() if sampling.ignore_eos else frozenset(own_stops)
    stops = own if sampling.stop_token_ids is None else frozenset(sampling.stop_token_ids)
    if len(stops) > MOST_STOP_TOKENS:
        rule = f"{len(stops)} stop tokens, at most {MOST_STOP_TOKENS} are allowed"
        raise ProblemsError("this request cannot be served", [rule])
    return stops
