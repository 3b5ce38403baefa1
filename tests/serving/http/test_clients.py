"""The real clients of OpenAI and Anthropic against a real engine, and what is left of those who leave."""

import asyncio
import concurrent.futures
import dataclasses
import random
import time

import anthropic
import openai
import pytest

from dsv4_jax.serving.requests import Sampling
from tests.serving.http.served import (
    LIMITS,
    NAME,
    SIZES,
    Served,
    engine_of,
    events_of,
    model_of,
    model_with_text,
    until,
)

USER = [{"role": "user", "content": "hello wörld"}]

# httpx leaves generators of a stream that was closed to the garbage collector, which may run in the server's
# thread while they run in the client's. Only these classes, which are all httpx's, are let off.
of_httpx = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <async_generator object "
    "(BoundAsyncStream|Response.aiter_raw|AsyncResponseStream):pytest.PytestUnraisableExceptionWarning"
)
PLAIN = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def chat(client, **fields):
    fields = {"model": NAME, "messages": USER, "max_tokens": 24, "seed": 5} | fields
    return client.chat.completions.create(**fields)


def folded(chunks):
    """Choice -> (reasoning, content, finish reason) of a stream."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            parts = found.setdefault(choice.index, ["", "", None])
            parts[0] += getattr(choice.delta, "reasoning_content", None) or ""
            parts[1] += choice.delta.content or ""
            parts[2] = choice.finish_reason or parts[2]
    return found


def whole(answer):
    return {
        choice.index: [
            getattr(choice.message, "reasoning_content", None) or "",
            choice.message.content or "",
            choice.finish_reason,
        ]
        for choice in answer.choices
    }


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_stream_and_a_whole_answer_are_the_same(client, thinking):
    fields = {"n": 3, "extra_body": {"thinking": {"type": thinking}}}
    answer = chat(client, **fields)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **fields))
    assert folded(chunks) == whole(answer)
    assert len({str(each) for each in whole(answer).values()}) == 3, "the choices differ"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    assert (answer.usage.completion_tokens_details.reasoning_tokens > 0) == (thinking == "enabled")
    assert answer.system_fingerprint == chunks[0].system_fingerprint != ""


def test_a_seed_decides_and_none_is_another_each_time(client):
    first, again, other = (whole(chat(client, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert whole(chat(client, seed=openai.NOT_GIVEN)) != whole(chat(client, seed=openai.NOT_GIVEN))
    assert whole(chat(client, seed=-1)) == whole(chat(client, seed=2**63 - 1))


def test_the_tokens_are_those_of_the_engine(client, server):
    sampling = Sampling(max_tokens=12, seed=3, temperature=0.7, top_p=0.9)
    prompt = server.engine.ids_of("hello")
    answer = server.engine.complete(prompt, sampling)
    asked = {"max_tokens": 12, "seed": 3, "temperature": 0.7, "top_p": 0.9, "model": NAME}
    assert client.completions.create(prompt=list(prompt), **asked).choices[0].text == answer.text
    body = {"extra_body": {"add_special_tokens": True}}
    assert client.completions.create(prompt="hello", **asked, **body).choices[0].text == answer.text


def test_a_stop_text_ends_an_answer(client):
    text = chat(client, extra_body=PLAIN, max_tokens=60).choices[0].message.content
    stop = text[8:11]
    answer = chat(client, extra_body=PLAIN, max_tokens=60, stop=[stop, "never"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    plain = client.completions.create(model=NAME, prompt="hello", max_tokens=40, seed=1).choices[0].text
    cut = client.completions.create(model=NAME, prompt="hello", max_tokens=40, seed=1, stop=plain[5:7])
    assert cut.choices[0].text == plain[: plain.index(plain[5:7])]


def test_a_bias_forces_a_token_and_log_probabilities_tell(client, server):
    token = server.engine.ids_of("o")[-1]
    answer = chat(
        client, extra_body=PLAIN, max_tokens=4, logit_bias={str(token): 100}, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].message.content == "oooo"
    content = answer.choices[0].logprobs.content
    assert [(each.token, bytes(each.bytes)) for each in content] == [("o", b"o")] * 4
    for each in content:
        likeliest = [pair.logprob for pair in each.top_logprobs]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert each.logprob <= likeliest[0] <= 0
    chunks = list(chat(client, stream=True, max_tokens=9, logprobs=True, top_logprobs=0))
    found = [each.logprobs for chunk in chunks for each in chunk.choices if each.logprobs]
    assert sum(len(each.content) + len(each.reasoning_content) for each in found) == 9


def test_prompts_are_scored_as_answers_are(client, server):
    answer = client.completions.create(
        model=NAME, prompt="hello wörld", max_tokens=6, logprobs=4, echo=True, temperature=0
    ).choices[0]
    lists = answer.logprobs
    ids = server.engine.lm.tokenizer.encode("hello wörld").ids
    assert answer.text.startswith("hello wörld") and lists.token_logprobs[0] is lists.top_logprobs[0] is None
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset) == len(ids) + 6
    drawn = server.engine.complete(ids, Sampling(max_tokens=6, temperature=0)).token_ids
    scored = client.completions.create(
        model=NAME, prompt=[*ids, *drawn], max_tokens=0, logprobs=4, echo=True
    ).choices[0]
    assert scored.logprobs.tokens == lists.tokens
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(lists.token_logprobs[1:], abs=1e-4)
    for token, best in zip(lists.tokens[len(ids) :], scored.logprobs.top_logprobs[len(ids) :], strict=True):
        assert max(best, key=best.get) == token, "greedy answers are the likeliest tokens of the scores"
    logits = server.engine.lm.logits([ids])[0]
    expected = [float(row[id] - _logsumexp(row)) for row, id in zip(logits, ids[1:], strict=False)]
    assert lists.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)


def _logsumexp(row):
    import numpy as np

    row = np.asarray(row, np.float64)
    return row.max() + np.log(np.exp(row - row.max()).sum())


def test_a_list_of_prompts_is_answered_in_its_order(client):
    prompts = ["hello", "wörld", "hello wörld"]
    answer = client.completions.create(
        model=NAME, prompt=prompts, max_tokens=5, n=2, temperature=0, echo=True
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    for number, choice in enumerate(answer.choices):
        assert choice.text.startswith(prompts[number // 2])
    chunks = list(
        client.completions.create(model=NAME, prompt=prompts, max_tokens=5, n=2, temperature=0, stream=True)
    )
    texts = dict.fromkeys(range(6), "")
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    for choice in answer.choices:
        assert choice.text == prompts[choice.index // 2] + texts[choice.index]


def test_a_second_prompt_profits_from_the_first(client):
    messages = [{"role": "user", "content": "hello wörld " * 12}]
    first = chat(client, messages=messages, max_tokens=2).usage
    second = chat(client, messages=messages, max_tokens=2).usage
    assert second.prompt_cache_hit_tokens == second.prompt_tokens_details.cached_tokens >= SIZES.chunk
    assert second.prompt_cache_hit_tokens + second.prompt_cache_miss_tokens == first.prompt_tokens


def test_times_and_memory_are_told(client, server):
    """The three times of a request are its whole time, but for the ways between threads."""
    names = [f"request_{name}_time_seconds" for name in ("queue", "prefill", "decode")]
    names += ["time_to_first_token_seconds", "e2e_request_latency_seconds"]
    sums, counts = ({name: server.metric(name + end) for name in names} for end in ("_sum", "_count"))
    chat(client, max_tokens=20, extra_body={"ignore_eos": True})
    assert [server.metric(f"{name}_count") - counts[name] for name in names] == [1] * 5
    queue, prefill, decode, first, whole = (server.metric(f"{name}_sum") - sums[name] for name in names)
    assert 0 < queue + prefill <= first < whole and decode == pytest.approx(whole - first, abs=0.01)
    stream = chat(client, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    for _ in zip(range(20), stream, strict=False):
        pass
    pools = {pool: server.metric("kv_cache_usage_perc", pool=pool) for pool in ("swa", "state", "csa", "hca")}
    stream.close()
    until(server.idle)
    assert pools["swa"] == pools["state"] == 1 / SIZES.num_slots
    assert 20 / SIZES.max_length <= SIZES.num_slots * pools["csa"] == SIZES.num_slots * pools["hca"] <= 1
    assert server.metric("kv_cache_usage_perc", pool="csa") == 0


def test_models_and_errors_of_the_client(client, server):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == SIZES.max_length
    with pytest.raises(openai.NotFoundError):
        chat(client, model="other")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        chat(client, max_tokens=SIZES.max_length)
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.01), max_tokens=400, extra_body={"ignore_eos": True})
    until(server.idle)


def test_a_client_tries_again_when_it_is_told_to(server):
    calls = []
    plain = server.service.take_waiting

    def busy_once(tokens):
        calls.append(tokens)
        if len(calls) == 1:
            raise server.busy
        plain(tokens)

    from dsv4_jax.serving.http import errors

    server.busy = errors.busy("try again")
    server.busy.retry_after = 0
    server.service.take_waiting = busy_once
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=2) as client:
            assert chat(client).choices
    finally:
        del server.service.take_waiting
    assert len(calls) == 2


def test_a_stream_that_is_closed_frees_its_slot(client, server):
    before = server.metric("disconnect_aborts_total")
    fields = {"max_tokens": 400, "extra_body": {"ignore_eos": True} | PLAIN, "stream": True}
    for _ in range(3):
        stream = chat(client, **fields)
        next(iter(stream))
        stream.close()
    until(server.idle)
    assert server.metric("disconnect_aborts_total") == before + 3


async def _storm(server, count, seed, seconds=None):
    """Streams of which some are left at random times; returns how many came to their end."""
    chance = random.Random(seed)
    complete = 0
    end = None if seconds is None else time.monotonic() + seconds

    async def one(client, number):
        nonlocal complete
        leaves_after = chance.choice([None, 0, 1, 3, 8])
        prompt = "hello wörld " * chance.randrange(1, 12)
        stream = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=chance.randrange(1, 40), seed=number, stream=True
        )
        got = 0
        async for _ in stream:
            got += 1
            if leaves_after is not None and got > leaves_after:
                await stream.close()
                return
        complete += 1

    async def worker(client, numbers):
        for number in numbers:
            await one(client, number)
            if end is not None and time.monotonic() > end:
                return

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=40) as client:
        if seconds is None:
            await asyncio.gather(*(one(client, number) for number in range(count)))
        else:
            workers = (worker(client, range(start, 10**9, count)) for start in range(count))
            await asyncio.gather(*workers)
    return complete


@of_httpx
def test_many_streams_of_which_some_are_left(server):
    finished = server.engine.status().num_finished
    complete = asyncio.run(_storm(server, 60, seed=1))
    until(server.idle)
    assert 0 < complete < 60
    assert server.engine.status().num_finished >= finished + complete
    prefixes = server.engine._core.prefixes
    prefixes.check()
    assert prefixes.num_free + len(prefixes) == SIZES.num_pages


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [60, 300])
@of_httpx
def test_two_hundred_streams_for_a_while(seconds):
    """With room for all of them to wait, none is refused; nothing is left of those that were closed."""
    limits = dataclasses.replace(LIMITS, waiting_contexts=128)
    with engine_of(model_with_text(), most_waiting=256) as engine:
        server = Served(model_of(engine), limits=limits)
        try:
            assert asyncio.run(_storm(server, 200, seed=2, seconds=seconds)) > 200
            until(server.idle, 60)
            engine._core.prefixes.check()
        finally:
            server.close()


def test_every_way_of_drawing_at_once(server):
    """Extremes of all rules in one batch: the engine serves on."""
    chance = random.Random(3)
    extremes = {
        "temperature": (0, 2), "top_p": (1e-6, 1), "top_k": (1, 400), "min_p": (0, 1), "seed": (0, 2**63 - 1),
        "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100),
        "logit_bias": ({}, {str(id): 100 for id in range(320)}), "min_tokens": (0, 30),
        "ignore_eos": (False, True), "logprobs": (None, 20), "stop": (None, ["o"]), "n": (1, 4),
    }  # fmt: skip
    bodies = [{name: chance.choice(values) for name, values in extremes.items()} for _ in range(24)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda fields: server.complete(max_tokens=12, **fields), bodies))
    assert [response.status_code for response in found] == [200] * 24
    until(server.idle)
    assert dataclasses.asdict(server.engine.status())["num_running"] == 0
    assert events_of(server.complete(stream=True).text)


MESSAGE = {"model": NAME, "messages": USER, "max_tokens": 64}


def endless(server):
    """Fields of a message that is long: a random model would now and then end its turn."""
    token = server.engine.ids_of("o")[-1]
    return MESSAGE | {"max_tokens": 400, "extra_body": {"logit_bias": {str(token): 100}}}


def anthropic_client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_stream_and_a_whole_message_are_the_same(server, thinking):
    switch = {"type": thinking} | ({"budget_tokens": 1024} if thinking == "enabled" else {})
    fields = MESSAGE | {"max_tokens": 24, "thinking": switch, "extra_body": {"seed": 5}}
    with anthropic_client(server) as client:
        whole = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            final = stream.get_final_message()
        raw = client.messages.with_raw_response.create(**fields)
    assert [each.to_dict() for each in final.content] == [each.to_dict() for each in whole.content]
    assert whole.content[0].type == ("thinking" if thinking == "enabled" else "text")
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    for usage in (whole.usage, final.usage):
        assert usage.output_tokens == 24 and usage.input_tokens > 0
    assert whole.id.startswith("msg_") and whole.model == NAME and whole.role == "assistant"
    assert ("budget_tokens" in raw.headers.get("x-dsv4-warning", "")) == (thinking == "enabled")


def test_the_same_words_cost_the_same_as_in_openais_form(server):
    with anthropic_client(server) as client:
        counted = client.messages.count_tokens(model=NAME, messages=USER, system="be kind").input_tokens
        usage = client.messages.create(**MESSAGE | {"max_tokens": 1}, system="be kind").usage
    messages = [{"role": "system", "content": "be kind"}, *USER]
    again = server.post("/v1/messages", MESSAGE | {"max_tokens": 1, "system": "be kind"}).json()["usage"]
    assert again["input_tokens"] + again["cache_read_input_tokens"] == counted
    asked = {"messages": messages, "max_tokens": 1, "thinking": {"type": "disabled"}}
    openais = server.post("/v1/chat/completions", asked).json()["usage"]["prompt_tokens"]
    assert counted == openais == usage.input_tokens + usage.cache_read_input_tokens


def test_a_stream_that_is_left_frees_its_slot(server):
    before = server.metric("disconnect_aborts_total")
    fields = endless(server)
    with anthropic_client(server) as client:
        for _ in range(2):
            with client.messages.stream(**fields) as stream:
                next(iter(stream))
        with pytest.raises(anthropic.APITimeoutError):
            client.with_options(timeout=0.01).messages.create(**fields)
    until(server.idle)
    assert server.metric("disconnect_aborts_total") == before + 3


def test_a_task_that_is_cancelled_frees_its_slot(server):
    fields = endless(server)

    async def cancelled():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
            task = asyncio.create_task(client.messages.create(**fields))
            while server.engine.status().num_running == 0:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    until(server.idle)
