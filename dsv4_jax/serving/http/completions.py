"""`POST /v1/completions`: raw texts or token ids, continued; with `echo` and `logprobs` also scored."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from dsv4_jax.inference.text import prompt_ids
from dsv4_jax.serving.http import samplings
from dsv4_jax.serving.http.choices import Choices
from dsv4_jax.serving.http.errors import HttpProblem, invalid
from dsv4_jax.serving.http.responses import DONE, event
from dsv4_jax.serving.http.schemas import CompletionFields, read_fields
from dsv4_jax.serving.http.service import Model, Service
from dsv4_jax.serving.http.usage import usage
from dsv4_jax.serving.requests import Output, Sampling, TokenLogprob

DEFAULT_TOKENS = 16
"""OpenAI's, of a request that says nothing."""


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A checked request.

    Attributes:
        fields: as sent. prompts: ids of each. texts: of each, for `echo`; () without.
        samplings: of the first choice of each prompt; empty if no token is to be drawn.
    """

    fields: CompletionFields
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    samplings: tuple[Sampling, ...]

    @property
    def per_prompt(self) -> int:
        """Answers to each prompt."""
        return self.fields.n or 1

    def asked(self) -> list[tuple[Sequence[int], Sampling]]:
        """What each choice asks of the engine; the choices of a prompt follow each other."""
        found = []
        for prompt, sampling in zip(self.prompts, self.samplings, strict=False):
            for index in range(self.per_prompt):
                seed = samplings.seed_of_choice(sampling.seed, index)
                found.append((prompt, dataclasses.replace(sampling, seed=seed)))
        return found


def read_completion(service: Service, model: Model, body: Mapping[str, Any]) -> CompletionRequest:
    """Checks a request and encodes its prompts. It takes time for long ones: call it in a thread.

    Raises:
        HttpProblem, ProblemsError: with every problem.
    """
    fields, problems = read_fields(CompletionFields, body)
    if fields is not None:
        problems += _contradictions(service, model, fields)
    if problems or fields is None:
        raise invalid(problems)
    service.check_name(fields.model)
    lm = model.engine.lm
    prompts = tuple(_ids(model, prompt, bool(fields.add_special_tokens)) for prompt in fields.prompt)
    if any(list(ids) == [lm.config.bos_token_id] for ids in prompts):
        raise invalid(["prompt: nothing but the token that begins a text gives nothing to continue"])
    rooms = [
        0 if fields.max_tokens == 0 else
        samplings.room_for(model, service.limits, len(ids), fields.max_tokens, DEFAULT_TOKENS)
        for ids in prompts
    ]  # fmt: skip
    first = samplings.sampling_of(fields, max_tokens=1, stop=fields.stop, logprobs=fields.logprobs)
    drawn = tuple(dataclasses.replace(first, max_tokens=room or 1) for room in rooms)
    for ids, sampling in zip(prompts, drawn, strict=True):
        room = 0 if fields.max_tokens == 0 else sampling.max_tokens
        checked = sampling if room else dataclasses.replace(sampling, min_tokens=0)
        samplings.check_served(model, ids, checked)
    scored = sum(map(len, prompts)) if fields.echo else 0
    samplings.check_logprobs(service.limits, (sum(rooms) + scored) * (fields.n or 1), fields.logprobs)
    texts: tuple[str, ...] = ()
    if fields.echo:
        texts = tuple(
            each if isinstance(each, str) else lm.tokenizer.decode(each, skip_special_tokens=False)
            for each in fields.prompt
        )
    return CompletionRequest(fields, prompts, texts, () if fields.max_tokens == 0 else drawn)


def _contradictions(service: Service, model: Model, fields: CompletionFields) -> list[str]:
    found = []
    count = len(fields.prompt) * (fields.n or 1)
    if count > service.limits.most_choices:
        found.append(f"prompt: {count} answers are asked for; at most {service.limits.most_choices} at once")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        found.append("best_of: is not offered")
    if fields.stream_options is not None and not fields.stream:
        found.append("stream_options: needs stream: true")
    has_texts = model.texts is not None
    if not has_texts and (fields.echo or fields.logprobs is not None or fields.stop):
        found.append("prompt: echo, logprobs and stop need a tokenizer.json, which is not there")
    if not has_texts and any(isinstance(prompt, str) for prompt in fields.prompt):
        found.append("prompt: text needs a tokenizer.json, which is not there")
    return found


def _ids(model: Model, prompt: str | list[int], with_bos: bool) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    lm = model.engine.lm
    bos = lm.config.bos_token_id if with_bos else None
    return tuple(prompt_ids(lm.tokenizer, prompt, bos))


class CompletionAnswer:
    """The response to a checked request; arguments as of `ChatAnswer`."""

    def __init__(
        self,
        service: Service,
        model: Model,
        request: CompletionRequest,
        salt: bytes,
        cut: Callable[[], None] | None = None,
    ) -> None:
        self._service, self._model, self._request = service, model, request
        self._choices = Choices(service, model, request.asked(), salt, cut)
        self._offsets = [0] * (len(request.prompts) * request.per_prompt)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(16)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": model.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """The JSON object of the whole answer."""
        outputs: list[list[Output]] = [[] for _ in self._offsets]
        scores = await self._prompt_scores()
        async with self._choices as choices:
            while found := await choices.more():
                for index, output in found:
                    outputs[index].append(output)
        choices_found = []
        for index, each in enumerate(outputs):
            text = "".join(output.text for output in each)
            tokens = _scored(each)
            if self._request.fields.echo:
                number = index // self._request.per_prompt
                text = self._request.texts[number] + text
                tokens = scores[number] + tokens
            reason = each[-1].finish_reason if each else "length"
            choices_found.append(self._choice(index, text, tokens, reason))
        return {**self._head, "choices": choices_found, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Encoded events."""
        options = self._request.fields.stream_options
        with_usage = options is not None and bool(options.include_usage)
        more = {"usage": None} if with_usage else {}
        nothing_drawn = not self._request.samplings
        scores = await self._prompt_scores()
        if self._request.fields.echo or nothing_drawn:
            for index in range(len(self._offsets)):
                number = index // self._request.per_prompt
                text = self._request.texts[number] if self._request.fields.echo else ""
                reason = "length" if nothing_drawn else None
                choice = self._choice(index, text, scores[number] if scores else [], reason)
                yield event({**self._head, **more, "choices": [choice]})
        async with self._choices as choices:
            while found := await choices.more():
                for index, output in found:
                    if output.text or output.logprobs or output.finish_reason:
                        choice = self._choice(index, output.text, _scored([output]), output.finish_reason)
                        yield event({**self._head, **more, "choices": [choice]})
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    async def _prompt_scores(self) -> list[list[tuple[int, TokenLogprob | None]]]:
        fields = self._request.fields
        if not fields.echo or fields.logprobs is None:
            return [[] for _ in self._request.prompts] if fields.echo else []
        found = []
        for ids in self._request.prompts:
            try:
                scores = await asyncio.to_thread(self._model.scores.score, ids)
            except FloatingPointError:
                self._service.metrics.corrupted.inc()
                message = "the model's numbers are not finite for this prompt"
                raise HttpProblem(500, message, kind="server_error", code="engine_error") from None
            found.append(list(zip(ids, scores, strict=True)))
        return found

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[tuple[int, TokenLogprob | None]],
        reason: str | None,
    ) -> dict[str, Any]:
        wanted = self._request.fields.logprobs
        lists = None
        if wanted is not None:
            assert self._model.texts is not None
            lists = self._model.texts.completion_lists(tokens, wanted, self._offsets[index])
            self._offsets[index] += sum(map(len, lists["tokens"]))
        return {"index": index, "text": text, "logprobs": lists, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        choices, per_prompt = self._choices, self._request.per_prompt
        cached = sum(
            max(choices.cached[at : at + per_prompt]) for at in range(0, len(choices.cached), per_prompt)
        )
        return usage(sum(map(len, self._request.prompts)), sum(choices.counts), cached)


def _scored(outputs: Sequence[Output]) -> list[tuple[int, TokenLogprob | None]]:
    return [(each.token_id, each) for output in outputs for each in output.logprobs]
