"""A server in a thread of the test's own process: over a small random model, or over answers of the test."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
import types

import httpx
import uvicorn
from tokenizers import AddedToken

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.serving.chat import control
from dsv4_jax.serving.chat.profile import OWN
from dsv4_jax.serving.chat.tokens import chat_tokenizer
from dsv4_jax.serving.engine import Engine, EngineBusy, EngineStatus  # noqa: F401
from dsv4_jax.serving.http.auth import Keys
from dsv4_jax.serving.http.lifecycle import configured
from dsv4_jax.serving.http.limits import Limits
from dsv4_jax.serving.http.service import Model, Service
from dsv4_jax.serving.http.token_texts import TokenTexts
from dsv4_jax.serving.requests import Output, TokenLogprob
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.training.tokenizer import train_tokenizer
from tests.models import compressed_kinds

SIZES = EngineSettings(max_length=512, num_slots=4, num_lanes=2, chunk=32, num_pages=64, num_states=16)
NAME = "tiny"
KEY, OTHER_KEY = "key-of-tests-1", "key-of-tests-2"
LIMITS = Limits(body_bytes=1 << 20)
HASTY = dataclasses.replace(LIMITS, header_seconds=0.6, body_seconds=0.8)


CONFIG = compressed_kinds(vocab_size=320, initializer_range=0.3)


def tokenizer_with_marks():
    """A byte-level tokenizer that has every mark of the chat format as a token."""
    tokenizer = train_tokenizer(["hello world, wörld 你好 🙂\n" * 9], CONFIG.vocab_size - 20)
    marks = [each for each in control.CONTROL if each not in (control.BOS, control.EOS)]
    tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in marks])
    assert tokenizer.get_vocab_size() <= CONFIG.vocab_size
    return tokenizer


def model_with_text():
    """A random model with that tokenizer."""
    lm = LanguageModel.random(CONFIG, Policy.of("float32"), seed=1)
    lm.tokenizer = tokenizer_with_marks()
    return lm


class ActedEngine:
    """Answers as `script(ids, sampling)` says: token ids, seconds to wait, outputs, errors to raise.

    Attributes:
        asked: (ids, sampling, salt) of every request.
    """

    def __init__(self, lm, settings):
        self.lm, self.settings, self.failed = lm, settings, False
        self.num_open = self.num_finished = 0
        self.reset()

    def reset(self):
        self.asked = []
        self.say("ok")

    def say(self, text, finish="stop"):
        """Answers every request with a text in which marks are tokens."""
        ids = self.lm.tokenizer.encode(text, add_special_tokens=False).ids
        self.script = lambda prompt, sampling: [*ids, *([1] if finish == "stop" else [])]

    async def generate(self, ids, sampling, *, salt=b"", priority=0):
        self.asked.append((tuple(ids), sampling, salt))
        self.num_open += 1
        try:
            count = 0
            for step in self.script(ids, sampling):
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                if isinstance(step, BaseException):
                    raise step
                await asyncio.sleep(0)
                if isinstance(step, Output):
                    yield step
                    continue
                count += 1
                reason = "stop" if step == 1 else "length" if count == sampling.max_tokens else None
                text = "" if step == 1 else self.lm.tokenizer.decode([step])
                logprobs = () if sampling.logprobs is None else (TokenLogprob(step, -0.5, ((step, -0.5),)),)
                yield Output((step,), text, logprobs, finish_reason=reason)
                if reason:
                    return
            yield Output(finish_reason="length")
        finally:
            self.num_open -= 1
            self.num_finished += 1

    def status(self):
        return EngineStatus(self.num_open, 0, self.num_finished, 0, 0, 0, 0, 0, 0)

    def close(self, drain_seconds=0.0):
        pass


class ActedScores:
    """Every token of a prompt is the likeliest."""

    def score(self, ids):
        return [None, *(TokenLogprob(id, -0.5, ((id, -0.5),)) for id in ids[1:])]


def acted_model():
    tokenizer = tokenizer_with_marks()
    lm = types.SimpleNamespace(config=CONFIG, tokenizer=tokenizer, stop_token_ids=(1,))
    chat = chat_tokenizer(tokenizer, 0, (1,))
    return Model(
        ActedEngine(lm, dataclasses.replace(SIZES, max_length=8192)),
        OWN,
        "acted",
        chat,
        TokenTexts(tokenizer),
        ActedScores(),
        1,
    )


def model_of(engine):
    return Model.of(engine, OWN)


class Served:
    """A running server.

    Args:
        model: to serve; None: it is still loading. keys, limits: of the service.
    """

    def __init__(self, model, keys=(), limits=LIMITS, **more):
        self.service = Service(NAME, limits, Keys(keys), **more)
        if model is not None:
            self.service.become_ready(model)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = configured(self.service)
        self.app = config.app
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    def _run(self):
        asyncio.run(self._server.serve([self.socket]))

    @property
    def engine(self):
        return self.service.loaded.engine

    def idle(self):
        """Nothing is served, and nothing is left of anything that was."""
        status = self.engine.status()
        service = self.service
        return (
            status.num_running == status.num_waiting == service.num_requests == 0
            and service.bodies.used == service.waiting_tokens == 0
        )

    def metric(self, name, **labels):
        value = self.service.metrics.registry.get_sample_value(f"dsv4:{name}", {"model": NAME} | labels)
        return value or 0.0

    def post(self, path, body, **more):
        """A request with a JSON body, or with bytes as they are."""
        headers = {"content-type": "application/json"} | more.pop("headers", {})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=data, headers=headers, **more)

    def chat(self, content="hello", **fields):
        """A chat completion without reasoning; the response."""
        thinking = {"thinking": {"type": "disabled"}}
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 64} | thinking | fields
        return self.post("/v1/chat/completions", body)

    def complete(self, prompt="hello", **fields):
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 8} | fields)

    def connect(self):
        """A raw connection."""
        return contextlib.closing(socket.create_connection(("127.0.0.1", self.port), timeout=20))

    def close(self):
        self.client.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def engine_of(lm, sizes=SIZES, **more):
    return Engine(lm, sizes, **more)


def events_of(text):
    """The JSON values of a stream, which must be whole."""
    assert text.endswith("data: [DONE]\n\n")
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def error_of(response, status):
    """The error of a response in OpenAI's form."""
    assert response.status_code == status, (response.status_code, response.text)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    return error
