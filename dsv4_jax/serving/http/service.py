"""What all requests share: the model once it is there, limits, keys, numbers, and where in its life it is."""

import dataclasses
import hashlib
import time
from typing import Literal

from dsv4_jax.serving.chat.profile import Profile
from dsv4_jax.serving.chat.tokens import ChatTokenizer, chat_tokenizer
from dsv4_jax.serving.engine import Engine, EngineStatus
from dsv4_jax.serving.fingerprint import model_fingerprint
from dsv4_jax.serving.http import errors
from dsv4_jax.serving.http.auth import Keys
from dsv4_jax.serving.http.bodies import BodyRoom
from dsv4_jax.serving.http.grammars import Grammars
from dsv4_jax.serving.http.limits import Limits
from dsv4_jax.serving.http.metrics import Metrics
from dsv4_jax.serving.http.prompt_scores import PromptScores
from dsv4_jax.serving.http.token_texts import TokenTexts
from dsv4_jax.serving.settings import EngineSettings

State = Literal["loading", "ready", "draining", "failed"]


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything that answers need, once it is loaded and compiled."""

    engine: Engine
    profile: Profile
    fingerprint: str
    chat: ChatTokenizer | None  # None: no tokenizer, token ids only
    texts: TokenTexts | None
    scores: PromptScores
    created: int
    grammars: Grammars | None = None  # None: no tokenizer

    @staticmethod
    def of(engine: Engine, profile: Profile, *, warm_up: bool = True) -> "Model":
        """The model of an engine; `warm_up` compiles what the engine does not need itself."""
        lm = engine.lm
        chat = texts = grammars = None
        if lm.tokenizer is not None:
            chat = chat_tokenizer(lm.tokenizer, lm.config.bos_token_id, lm.stop_token_ids)
            texts = TokenTexts(lm.tokenizer)
            grammars = Grammars(lm.tokenizer, lm.config.vocab_size, lm.stop_token_ids)
        chunk = min(128, engine.settings.max_length)
        scores = PromptScores(lm, engine.settings.max_length, chunk)
        if warm_up:
            scores.score([0, 0])
        digest = model_fingerprint(lm, engine.settings.draft, with_weights=True)
        fingerprint = f"dsv4_{digest.hex()[:16]}"
        return Model(engine, profile, fingerprint, chat, texts, scores, int(time.time()), grammars)


class Service:
    """One server's state. Everything but `engine` is used by the event loop alone.

    Args:
        name: under which the model is served. limits: of requests. keys: who may ask.
        share_prefixes: tenants may profit from each other's prompts, and could notice it by time.
        insist_on_reasoning: refuse a conversation whose reasoning is missing after a call of a tool.
    """

    def __init__(
        self,
        name: str,
        limits: Limits | None = None,
        keys: Keys | None = None,
        *,
        share_prefixes: bool = False,
        insist_on_reasoning: bool = False,
    ) -> None:
        self.name, self.limits, self.keys = name, limits or Limits(), keys or Keys()
        self.share_prefixes, self.insist_on_reasoning = share_prefixes, insist_on_reasoning
        self.state: State = "loading"
        self.doing = "starting"
        self.num_requests = 0
        self.waiting_tokens = 0  # of prompts without a first output
        self.bodies = BodyRoom(self.limits.all_bodies_bytes)
        self.metrics = Metrics(name, self._status, self._sizes)
        self._model: Model | None = None

    def become_ready(self, model: Model) -> None:
        """Serves from now on."""
        self._model = model
        if self.state == "loading":
            self.state = "ready"

    @property
    def loaded(self) -> Model | None:
        """The model, also while the server drains; None before it is loaded."""
        return self._model

    @property
    def is_failed(self) -> bool:
        """Whether the engine has stopped by itself."""
        return self.state == "failed" or (self._model is not None and self._model.engine.failed)

    def model(self) -> Model:
        """The model for a new request. Raises HttpProblem (503) if none is accepted."""
        if self.is_failed:
            raise errors.unready("the engine has failed", "failed")
        if self.state == "draining":
            raise errors.unready("the server is stopping", "draining")
        if self._model is None or self.state != "ready":
            raise errors.unready("the model is being loaded", "loading")
        return self._model

    def check_name(self, name: str | None) -> None:
        """Raises HttpProblem (404) for another model than the served one."""
        if name not in (None, self.name):
            message = "model: this server has another one, see /v1/models"
            raise errors.HttpProblem(
                404, message, param="model", code="model_not_found", reason="unknown_model"
            )

    def salt(self, tenant: bytes, asked: str | None) -> bytes:
        """Whose prefixes a request may find: those of its key and of its own `cache_salt`."""
        parts = (b"" if self.share_prefixes else tenant, (asked or "").encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()

    def take_waiting(self, num_tokens: int) -> None:
        """Counts prompts that begin to wait. Raises HttpProblem (429) if too much waits already."""
        model = self.model()
        most = self.limits.waiting_contexts * model.engine.settings.max_length
        if self.waiting_tokens and self.waiting_tokens + num_tokens > most:
            raise errors.busy("too many prompt tokens wait already")
        self.waiting_tokens += num_tokens

    def _sizes(self) -> EngineSettings | None:
        return None if self._model is None else self._model.engine.settings

    def _status(self) -> EngineStatus | None:
        return None if self._model is None else self._model.engine.status()
