"""From the fields of a request to how the engine draws each of its choices."""

import hashlib
import secrets

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.http.errors import HttpProblem, invalid
from dsv4_jax.serving.http.limits import Limits
from dsv4_jax.serving.http.schemas import Sampled
from dsv4_jax.serving.http.service import Model
from dsv4_jax.serving.requests import Sampling, checked_request

MAX_SEED = 2**63 - 1


def sampling_of(
    fields: Sampled, *, max_tokens: int, stop: tuple[str, ...] = (), logprobs: int | None = None
) -> Sampling:
    """How to draw, with the official defaults for what is not said.

    Args:
        fields: of the request. max_tokens: of an answer. stop: texts that the engine looks for.
        logprobs: likeliest tokens a step, None for none.
    """
    ids = fields.stop_token_ids
    return Sampling(
        max_tokens=max_tokens,
        temperature=_given(fields.temperature, 1.0),
        top_p=_given(fields.top_p, 1.0),
        top_k=max(0, fields.top_k or 0),
        min_p=fields.min_p or 0.0,
        seed=secrets.randbits(63) if fields.seed is None else fields.seed & MAX_SEED,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_given(fields.repetition_penalty, 1.0),
        logit_bias=fields.logit_bias,
        stop=stop,
        stop_token_ids=None if ids is None else tuple(ids),
        ignore_eos=bool(fields.ignore_eos),
        min_tokens=fields.min_tokens or 0,
        logprobs=logprobs,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of each of several choices; the first has the request's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED


def room_for(model: Model, limits: Limits, num_prompt: int, asked: int | None, default: int | None) -> int:
    """Tokens that an answer may have.

    Args:
        num_prompt: tokens of the prompt. asked: by the request. default: without; None: all that fit.

    Raises:
        HttpProblem: 400, if prompt and answer are longer than a sequence may be.
    """
    most = model.engine.settings.max_length
    left = most - num_prompt
    if asked is None:
        caps = [cap for cap in (default, limits.max_tokens) if cap is not None]
        asked = max(1, min([left, *caps]))
    if asked > left:
        message = (
            f"max_tokens: {num_prompt} prompt tokens and {asked} of an answer are more than the {most} here"
        )
        raise HttpProblem(400, message, param="max_tokens", code="context_length_exceeded")
    return asked


def check_served(model: Model, ids: tuple[int, ...], sampling: Sampling) -> None:
    """Raises ProblemsError for what the engine would refuse, before any choice of the request is served."""
    lm = model.engine.lm
    sizes = (lm.config.vocab_size, model.engine.settings.max_length)
    try:
        checked_request(ids, sampling, lm.stop_token_ids, lm.tokenizer is not None, *sizes)
    except ProblemsError as refused:
        raise ProblemsError(refused.what, [_with_field(problem) for problem in refused.problems]) from None


_FIELDS = {
    "token ids": "prompt",
    "a token id of logit_bias": "logit_bias",
    "a stop token id": "stop_token_ids",
}


def _with_field(problem: str) -> str:
    """A problem of the engine's with the field that it is about, where it begins otherwise."""
    return next(
        (f"{field}: {problem}" for words, field in _FIELDS.items() if problem.startswith(words)), problem
    )


def check_logprobs(limits: Limits, num_tokens: int, wanted: int | None) -> None:
    """Raises HttpProblem (400) if a request asks for more log-probabilities than one may have."""
    if wanted is not None and num_tokens * (wanted + 1) > limits.logprob_budget:
        rule = f"logprobs: {num_tokens} tokens with {wanted} each are more than {limits.logprob_budget}"
        raise invalid([rule])
