"""Requests from threads and event loops: answers as from the core, and nothing is left of those who go."""

import asyncio
import dataclasses
import threading
import time

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.engine import Engine, EngineBusy, EngineStopped
from dsv4_jax.serving.requests import Sampling
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.training.tokenizer import train_tokenizer
from tests.models import compressed_kinds

SIZES = EngineSettings(max_length=64, num_slots=3, num_lanes=2, chunk=4, num_pages=16, num_states=8)
SHORT = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
LONG = dataclasses.replace(SHORT, max_tokens=50)


@pytest.fixture(scope="module")
def lm():
    config = compressed_kinds(initializer_range=0.3)
    model = LanguageModel.random(config, Policy.of("float32"), seed=1)
    model.tokenizer = train_tokenizer(["hello world, wörld 你好 🙂\n" * 9], config.vocab_size)
    return model


@pytest.fixture(scope="module")
def engine(lm):
    with Engine(lm, SIZES) as engine:
        yield engine


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def idle(engine):
    status = engine.status()
    return status.num_running == status.num_waiting == 0


def test_text_in_and_text_out(lm, engine):
    answer = engine.complete("hello", SHORT)
    assert answer.finish_reason == "length"
    assert answer.text == lm.generate("hello", 6, stop_token_ids=())
    assert engine.complete(list(engine.ids_of("hello")), SHORT).token_ids == answer.token_ids


def test_steps_are_counted_by_their_tokens(engine):
    prompt, before = engine.ids_of("hello"), engine.status()
    engine.complete(prompt, SHORT)
    after = engine.status()
    assert after.step_tokens - before.step_tokens == len(prompt) + SHORT.max_tokens
    steps = sum(after.steps_by_tokens) - sum(before.steps_by_tokens)
    assert SHORT.max_tokens <= steps <= SHORT.max_tokens + 1


def test_a_stop_text_over_token_borders_ends_the_answer(engine):
    whole = engine.complete("wörld", LONG)
    stop = whole.text[7:10]
    at = whole.text.find(stop)
    answer = engine.complete("wörld", dataclasses.replace(LONG, stop=(stop, "never written")))
    assert (answer.text, answer.finish_reason) == (whole.text[:at], "stop")
    assert len(answer.token_ids) < len(whole.token_ids)
    until(lambda: idle(engine))
    assert engine.complete("wörld", LONG) == dataclasses.replace(whole, cached_tokens=answer.cached_tokens)


def test_many_at_once_are_answered_in_their_order(engine):
    prompts = [[number + 1] * (1 + number % 5) for number in range(12)]
    one_by_one = [engine.complete(prompt, SHORT).token_ids for prompt in prompts]
    together = engine.complete_all(prompts, SHORT)
    assert [answer.token_ids for answer in together] == one_by_one


def test_streams_of_an_event_loop_and_a_caller_who_leaves(engine):
    finished = engine.status().num_finished

    async def stream(number):
        tokens = []
        async for output in engine.generate([number + 1], LONG):
            tokens += output.token_ids
            if number % 2 and len(tokens) >= 2:
                break
        return tokens

    async def all_of_them():
        return await asyncio.gather(*map(stream, range(8)))

    got = asyncio.run(all_of_them())
    assert [len(tokens) for tokens in got] == [50, 2] * 4
    until(lambda: idle(engine))
    assert engine.status().num_finished == finished + 8
    assert got[0] == list(engine.complete([1], LONG).token_ids)


def test_a_cancelled_task_frees_its_slot(engine):
    async def cancelled():
        stream = engine.generate([5], LONG)
        task = asyncio.create_task(anext(stream))
        await task
        other = asyncio.create_task(anext(stream))
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        await stream.aclose()

    asyncio.run(cancelled())
    until(lambda: idle(engine))


def test_refusals_reach_the_caller_and_harm_nobody(engine):
    with pytest.raises(ProblemsError, match="max_tokens=0"):
        engine.complete([1], Sampling(max_tokens=0))
    with pytest.raises(ProblemsError, match="stop"):
        engine.complete_all([[1], [2]], [SHORT, dataclasses.replace(SHORT, stop=("",))])
    until(lambda: idle(engine))
    assert engine.complete([1], SHORT).finish_reason == "length"


def test_too_many_waiting_are_refused(lm):
    with Engine(lm, SIZES, most_waiting=1, warm_up=False) as engine:
        gate = threading.Event()
        engine._commands.append(gate.wait)  # keeps the engine's thread from starting on anything
        threads = [threading.Thread(target=engine.complete, args=([1], SHORT)) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: engine._num_open == 4)
        with pytest.raises(EngineBusy, match="4 requests"):
            engine.complete([1], SHORT)
        gate.set()
        for thread in threads:
            thread.join()


def test_closing_aborts_or_waits_and_refuses_later_requests(lm):
    for drain, reasons in ((0.0, {"aborted", "error"}), (60.0, {"length"})):
        engine = Engine(lm, SIZES, warm_up=False)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(engine.complete([1], LONG)))  # noqa: B023
        thread.start()
        until(lambda: engine.status().num_running == 1)  # noqa: B023
        engine.close(drain)
        thread.join()
        assert answers[0].finish_reason in reasons
        with pytest.raises(EngineStopped, match="closed"):
            engine.complete([1], SHORT)


def test_a_step_that_fails_tells_everybody(lm, monkeypatch, caplog):
    engine = Engine(lm, SIZES, warm_up=False)

    def broken():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine._core, "step", broken)
    answer = engine.complete([1], SHORT)
    assert answer.finish_reason == "error" and "the device is gone" in answer.error
    with pytest.raises(EngineStopped, match="failed"):
        engine.complete([1], SHORT)
    assert "the device is gone" in caplog.text
    engine.close()


def test_a_caller_who_goes_before_the_engine_has_looked_harms_nobody(lm):
    with Engine(lm, SIZES, warm_up=False) as engine:
        gate = threading.Event()
        engine._commands.append(gate.wait)

        async def gone():
            task = asyncio.create_task(anext(engine.generate([1], LONG)))
            while not engine._adding:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(gone())
        gate.set()
        until(lambda: engine._num_open == 0)
        assert engine.complete([1], SHORT).finish_reason == "length"
        until(lambda: idle(engine))


def test_nobody_waits_for_an_engine_that_failed_before_it_looked(lm, monkeypatch):
    engine = Engine(lm, SIZES, warm_up=False)
    gate = threading.Event()

    def broken():
        gate.wait()
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine._core, "step", broken)
    first = threading.Thread(target=engine.complete, args=([1], SHORT))
    first.start()
    until(lambda: engine._core.has_work)
    refused = []

    def late():
        try:
            engine.complete([2], SHORT)
        except EngineStopped as why:
            refused.append(str(why))

    second = threading.Thread(target=late)
    # The engine's thread holds no lock while it is in a step, so this request is only written down.
    second.start()
    until(lambda: engine._adding)
    gate.set()
    for thread in (first, second):
        thread.join(10)
        assert not thread.is_alive()
    assert len(refused) == 1 and "the device is gone" in refused[0]
    engine.close()
