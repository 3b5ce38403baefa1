"""LanguageModel: the face of a model for notebooks, the command line, servers and tests."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from tokenizers import Tokenizer

from dsv4_jax.arguments import capacity, checked_counts, checked_prompts, checked_tokens
from dsv4_jax.checkpoint.side_files import stop_token_ids, with_tokenizer
from dsv4_jax.config import ModelConfig
from dsv4_jax.inference import generate as generation
from dsv4_jax.inference.sampling import sample
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import Cache, new_cache
from dsv4_jax.model.initial import Network, Parameters, initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.numerics.weights import is_quantized

LOGGER = logging.getLogger(__name__)


class LanguageModel:
    """A model with its parameters, ready to run. Every method is compiled once per shape.

    Args:
        config: the architecture.
        policy: dtypes and numerics.
        parameters: nested dict as `initial_parameters` or `load_checkpoint` return.
        tokenizer: for text in, text out; None allows token ids only.
        stored: tensor name -> dtype on disk, as loaded; lets `save` write it back unchanged.
        side_files: small files by name, as loaded, for `save`; `tokenizer` decides about tokenizer.json.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        parameters: Parameters,
        tokenizer: Tokenizer | None = None,
        stored: Mapping[str, str] | None = None,
        side_files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.parameters = parameters
        self.tokenizer = tokenizer
        self.stored = dict(stored or {})
        self.side_files = dict(side_files or {})
        self._network = Network(config, policy)

    @classmethod
    def random(cls, config: ModelConfig, policy: Policy, seed: int = 0) -> "LanguageModel":
        """A model with freshly drawn parameters."""
        return cls(config, policy, initial_parameters(config, policy, seed))

    @property
    def num_params(self) -> int:
        """Parameters, without the hash tables' integers (report, section 4.2)."""
        leaves = jax.tree.leaves(self.parameters, is_leaf=is_quantized)
        return sum(
            leaf.size for leaf in leaves if is_quantized(leaf) or jnp.issubdtype(leaf.dtype, jnp.floating)
        )

    # ---- whole sequences -------------------------------------------------------------------------

    def logits(
        self,
        tokens: Int32[Array, "B T"],
        num_valid: Int32[Array, "B"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> Float32[Array, "B T V"]:
        """Full forward: row t scores token t + 1.

        Args:
            tokens: i32[B, T].
            num_valid: i32[B] real tokens a row, the rest is padding; all of them by default.
            segment_ids: i32[B, T] for packed rows: runs of equal id > 0 are sequences, 0 is padding.

        Raises:
            ValueError: for ids outside the vocabulary or shapes that do not fit.
        """
        span = self._span(tokens, num_valid, segment_ids)
        return _logits(self._network, self.parameters, span)

    def streams(
        self,
        tokens: Int32[Array, "B T"],
        num_valid: Int32[Array, "B"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "L+1 B T N D"]:
        """Residual streams after the embedding and after each layer, compute dtype."""
        span = self._span(tokens, num_valid, segment_ids)
        return _streams(self._network, self.parameters, span)

    def layer(
        self, index: int, streams: Float[Array, "B T N D"], tokens: Int32[Array, "B T"]
    ) -> Float[Array, "B T N D"]:
        """The streams after one layer, from given streams before it: `streams` one layer at a time.

        Raises:
            ValueError: for an index outside 0 .. L-1, or bad tokens.
        """
        span = self._span(tokens, None, None)
        streams = jnp.asarray(streams, self.policy.compute_dtype)
        return _layer(self._network, self.parameters, index, streams, span)

    def taps(
        self,
        tokens: Int32[Array, "B T"],
        collect: Sequence[str],
        num_valid: Int32[Array, "B"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> list[dict[str, jax.Array]]:
        """Intermediate values by layer; names and shapes in `model.transformer.TAPS`."""
        span = self._span(tokens, num_valid, segment_ids)
        return _taps(self._network, self.parameters, span, frozenset(collect))

    def mtp_logits(self, tokens: Int32[Array, "B T"]) -> Float32[Array, "B T-1 V"]:
        """Multi-token prediction: row i predicts token i + 2 (report, section 2.1).

        Raises:
            ValueError: if the model has no MTP block, or T < 2.
        """
        if not self.config.num_nextn_predict_layers:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers = 0)")
        if np.shape(tokens)[1] < 2:
            raise ValueError(f"tokens of shape {np.shape(tokens)}: MTP needs at least 2 tokens a row")
        return _mtp_logits(self._network, self.parameters, self._span(tokens, None, None))

    def _span(self, tokens: Any, num_valid: Any, segment_ids: Any) -> spans.Span:
        ids = checked_tokens(tokens, self.config.vocab_size)
        if segment_ids is not None:
            if num_valid is not None:
                raise ValueError("give num_valid or segment_ids, not both")
            if np.shape(segment_ids) != ids.shape:
                raise ValueError(
                    f"segment_ids of shape {np.shape(segment_ids)} must match tokens {ids.shape}"
                )
            return spans.packed(ids, jnp.asarray(segment_ids, jnp.int32))
        return spans.from_start(ids, checked_counts(num_valid, ids.shape))

    # ---- incremental -----------------------------------------------------------------------------

    def new_cache(self, batch: int, max_length: int, max_rewind: int = 8) -> Cache:
        """An empty cache for `batch` rows of up to `max_length` tokens (see `model.cache.new_cache`)."""
        p = self.policy
        sizes = (self.config, batch, max_length)
        how = (p.row_dtype, p.cache_format, p.kernels == "xla")
        return _new_cache(*sizes, p.cache_dtype, max_rewind, *how)

    def extend(
        self,
        cache: Cache,
        tokens: Int32[Array, "B T"],
        num_valid: Int32[Array, "B"] | None = None,
    ) -> tuple[Float32[Array, "B T V"], Cache]:
        """Appends tokens to each row at its own position. The given cache is consumed (donated).

        Args:
            cache: from `new_cache` or an earlier `extend`.
            tokens: i32[B, T], any T >= 1.
            num_valid: i32[B] tokens to append a row, 0..T; the rest is padding and leaves no trace.

        Returns:
            Logits f32[B, T, V] (rows past num_valid mean nothing) and the cache after the call.

        Raises:
            ValueError: if a row would exceed `max_length`, or for bad tokens or shapes.
        """
        ids = checked_tokens(tokens, self.config.vocab_size)
        counts = checked_counts(num_valid, ids.shape)
        if ids.shape[0] != len(cache.length):
            raise ValueError(f"tokens have {ids.shape[0]} rows, the cache {len(cache.length)}")
        after = np.asarray(cache.length) + np.asarray(counts)
        if (after > cache.max_length).any():
            row = int(after.argmax())
            raise ValueError(
                f"row {row} would hold {after[row]} tokens; the cache was made for "
                f"max_length={cache.max_length}"
            )
        return _extend(self._network, self.parameters, cache, ids, counts)

    # ---- generation ------------------------------------------------------------------------------

    def generate(
        self,
        tokens: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_p: float = 1.0,
    ) -> Any:
        """Continues prompts.

        Args:
            tokens: i32[B, T], a list of B id lists of any lengths, or a str (needs a tokenizer).
            max_new_tokens: at most this many a row.
            temperature: 0 is greedy.
            seed: of the draws.
            stop_token_ids: end a row; None means the config's EOS, () never stops. A stopped row is
                filled up with the stop token it drew.
            top_p: nucleus mass.

        Returns:
            i32[B, max_new_tokens]; for a str prompt the new text, without stop tokens.
        """
        stops = self._stops(stop_token_ids)
        if isinstance(tokens, str):
            return "".join(self.stream_text(tokens, max_new_tokens, temperature, seed, stops, top_p))
        steps = list(self.stream(tokens, max_new_tokens, temperature, seed, stops, top_p))
        batch = len(tokens)
        out = np.stack(steps, axis=1) if steps else np.zeros((batch, 0), np.int32)
        missing = max_new_tokens - out.shape[1]
        return np.concatenate([out, np.repeat(out[:, -1:], missing, axis=1)], axis=1) if missing else out

    def stream(
        self,
        tokens: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_p: float = 1.0,
    ) -> Iterator[np.ndarray]:
        """As `generate` for ids, yielding i32[B] after each step."""
        prompts = checked_prompts(tokens, self.config.vocab_size)
        needed = max(len(prompt) for prompt in prompts) + max(max_new_tokens, 0)
        cache = self.new_cache(len(prompts), capacity(needed, self.config))
        yield from generation.stream(
            self,
            cache,
            prompts,
            max_new_tokens,
            vocab_size=self.config.vocab_size,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_token_ids=self._stops(stop_token_ids),
        )

    def stream_text(
        self,
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """Continues text, yielding pieces that are whole characters.

        Raises:
            ValueError: if the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json: give token ids instead of text")
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        if self.config.bos_token_id is not None:
            ids = [self.config.bos_token_id, *ids]
        stops = self._stops(stop_token_ids)
        new: list[int] = []
        shown = ""
        for token in self.stream([ids], max_new_tokens, temperature, seed, stops, top_p):
            if int(token[0]) in stops:
                break
            new.append(int(token[0]))
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            # At the end of an unfinished character, wait for its other bytes.
            if text != shown and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        rest = self.tokenizer.decode(new, skip_special_tokens=True)[len(shown) :]
        if rest:
            yield rest

    def prefill(self, cache, tokens, num_valid, last):
        """`inference.generate.Steps.prefill`: appends a chunk, keeps each row's newest logits."""
        return _prefill(self._network, self.parameters, cache, tokens, num_valid, last)

    def decode(self, cache, logits, key, index, temperature, top_p, running, stops):
        """`inference.generate.Steps.decode`: draws a token a row and appends it."""
        return _decode(
            self._network,
            self.parameters,
            cache,
            logits,
            key,
            index,
            temperature,
            top_p,
            running,
            stops,
        )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text by default: the EOS ids of config.json and generation_config.json."""
        return stop_token_ids(self.config, self.side_files)

    def _stops(self, stop_token_ids: Sequence[int] | None) -> tuple[int, ...]:
        return self.stop_token_ids if stop_token_ids is None else tuple(stop_token_ids)

    # ---- disk ------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        layout: Literal["official", "transformers"] = "official",
        overwrite: bool = False,
    ) -> None:
        """Writes a checkpoint folder, complete or not at all (see `checkpoint.save`).

        Args:
            path: a new or empty folder, unless `overwrite`.
            layout: tensor names and config keys to use.
            overwrite: replace a checkpoint that is already there.
        """
        from dsv4_jax.checkpoint.save import save_checkpoint

        notes = save_checkpoint(
            Path(path),
            self.config,
            self.parameters,
            layout=layout,
            stored=self.stored,
            side_files=with_tokenizer(self.side_files, self.tokenizer),
            overwrite=overwrite,
        )
        for note in notes:
            LOGGER.warning("%s: %s", path, note)


def load(
    path: str | Path,
    dtype: str = "bfloat16",
    numerics: str = "reference",
    *,
    weights: Literal["native", "dequantized"] = "native",
    kernels: str = "xla",
    cache: str = "plain",
    draft_head: Literal["refuse", "ignore"] = "refuse",
    text_only: bool = False,
    tokenizer: Literal["read", "ignore"] = "read",
    allow_links: str | Path | None = None,
) -> LanguageModel:
    """Loads any supported checkpoint folder: official or transformers layout, plain or quantised.

    Args:
        path: folder with config.json and safetensors files.
        dtype: of parameters, activations and cache: "bfloat16" or "float32".
        weights: "native" keeps FP8 and FP4 weights as they are stored and decodes them where they are used;
            "dequantized" makes them arrays of `dtype`, 2 to 8 times as large. The numbers are the same.
        numerics: "reference", or "qat" for the official quantisation simulation (`numerics.qat.SWITCHES`).
        kernels: "xla", "pallas" (TPU) or "pallas-interpret" (see `numerics.policy.KERNELS`).
        cache: how the cache keeps its rows: "plain", "fp8+fp8" or "fp8+mxfp4" (`numerics.cache_formats`).
        draft_head: "ignore" loads the backbone of a checkpoint with a DSpark draft head, without it.
        text_only: load the text model of a vision variant.
        tokenizer: "ignore" opens no tokenizer.json; the model takes token ids only and saves no tokenizer.
        allow_links: a folder that links may lead into, besides the folder itself and its hub cache.

    Raises:
        CheckpointError, ConfigError: with every problem found; nothing is left half loaded.
    """
    from dsv4_jax.checkpoint.load import load_checkpoint

    policy = Policy.of(dtype, numerics, kernels=kernels, cache=cache)
    accepted = {"draft_head": draft_head, "text_only": text_only, "allow_links": allow_links}
    loaded = load_checkpoint(Path(path), policy, weights=weights, tokenizer=tokenizer, **accepted)
    for warning in loaded.warnings:
        LOGGER.warning("%s: %s", path, warning)
    if loaded.experts_in_fp4:
        # On their grid already: rounding them again in every step would change nothing.
        policy = dataclasses.replace(policy, switches=policy.switches - {"expert_fp4"})
    held = (loaded.tokenizer, loaded.stored, loaded.side_files)
    return LanguageModel(loaded.config, policy, loaded.parameters, *held)


# ---- compiled steps: one jit each over (static network, parameter pytree, ...) ------------------------


_new_cache = jax.jit(new_cache, static_argnums=(0, 1, 2, 3, 4, 5, 6, 7))


@functools.partial(jax.jit, static_argnums=0)
def _logits(network, parameters, span):
    model = network.holding(parameters)
    return model.logits(model.hidden(model(span).streams))


@functools.partial(jax.jit, static_argnums=0)
def _streams(network, parameters, span):
    model = network.holding(parameters)
    e = model.embedding(span.ids)
    first = jnp.broadcast_to(e[:, :, None], (*e.shape[:2], model.config.hc_mult, e.shape[2]))
    taps = model(span, collect=frozenset({"streams"})).taps
    return jnp.stack([first, *(tap["streams"] for tap in taps)])


@functools.partial(jax.jit, static_argnums=(0, 2))
def _layer(network, parameters, index, streams, span):
    return network.holding(parameters).layer(index, streams, span)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _taps(network, parameters, span, collect):
    return network.holding(parameters)(span, collect=collect).taps


@functools.partial(jax.jit, static_argnums=0)
def _mtp_logits(network, parameters, span):
    model = network.holding(parameters)
    return model.logits(model.predict_further(model(span).streams, span)[0])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(network, parameters, cache, tokens, num_valid):
    model = network.holding(parameters)
    after = model(spans.appended(tokens, cache.length, num_valid), cache)
    return model.logits(model.hidden(after.streams)), after.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 5))
def _prefill(network, parameters, cache, tokens, num_valid, last):
    model = network.holding(parameters)
    after = model(spans.appended(tokens, cache.length, num_valid), cache)
    # Only each row's last real token meets the head.
    at = jnp.maximum(num_valid - 1, 0)[:, None, None, None]
    streams = jnp.take_along_axis(after.streams, at, axis=1)
    logits = model.logits(model.hidden(streams))[:, 0]
    return jnp.where(num_valid[:, None] > 0, logits, last), after.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _decode(network, parameters, cache, logits, key, index, temperature, top_p, running, stops):
    model = network.holding(parameters)
    drawn = sample(logits, jax.random.fold_in(key, index), temperature, top_p)
    token = jnp.where(running, drawn, stops[0])
    running = running & ~jnp.isin(token, stops)
    after = model(spans.appended(token[:, None], cache.length, jnp.ones_like(token)), cache)
    return token, model.logits(model.hidden(after.streams))[:, 0], running, after.cache
