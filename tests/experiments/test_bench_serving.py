"""The client of the benchmark of HTTP: it counts every token when it comes, and leaves when it is told to."""

import asyncio
import dataclasses

import numpy as np
import pytest

from dsv4_jax.serving.load import Load, send, summary
from dsv4_jax.serving.requests import Output, Sampling
from experiments.bench_serving import Server, beside_long_prompts
from tests.serving.http import served
from tests.serving.http.served import until


@pytest.fixture(scope="module")
def acted():
    running = served.Served(served.acted_model())
    yield running
    running.close()


@pytest.fixture
def client(acted):
    acted.engine.reset()
    acted.engine.script = lambda ids, sampling: [0.002, *[70] * sampling.max_tokens]
    client = object.__new__(Server)
    client.port = acted.port
    yield client
    until(acted.idle)


def test_every_token_is_seen_and_those_who_leave_leave(acted, client):
    load = Load(num_requests=12, prompt_tokens=9, answer_tokens=10, at_once=3, cancelled=0.4, seed=1)
    seen, seconds = asyncio.run(send(client.generate, 320, load))
    stayed = [one for one in seen if one.finish_reason == "length"]
    assert 0 < len(stayed) < 12 and all(len(one.arrived) == 10 for one in stayed)
    assert all(0 < len(one.arrived) <= 10 for one in seen)
    assert summary(seen, seconds)["left_early"] == 12 - len(stayed)
    ids, sampling, _ = acted.engine.asked[0]
    assert len(ids) >= 5 and sampling.ignore_eos and sampling.logprobs == 0


def test_long_prompts_go_on_as_long_as_the_load_does(acted, client):
    load = Load(num_requests=6, prompt_tokens=9, answer_tokens=10, at_once=2)
    seen, _, complete = asyncio.run(beside_long_prompts(client.generate, 320, load, 400))
    lengths = np.array([len(ids) for ids, _, _ in acted.engine.asked])
    assert len(seen) == 6 and complete >= 1 and (lengths == 400).sum() >= complete
    assert len({ids for ids, _, _ in acted.engine.asked if len(ids) == 400}) == (lengths == 400).sum()


def test_errors_are_not_taken_for_answers(acted, client):
    async def one(sampling):
        return [output async for output in client.generate([1, 2], sampling)]

    with pytest.raises(RuntimeError, match="400"):
        asyncio.run(one(dataclasses.replace(Sampling(), max_tokens=10**6)))
    acted.engine.script = lambda ids, sampling: [70, 70, Output(finish_reason="error", error="nan")]
    with pytest.raises(RuntimeError, match="not finite"):
        asyncio.run(one(Sampling(max_tokens=5)))
