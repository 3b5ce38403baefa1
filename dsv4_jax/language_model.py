"""LanguageModel: the face of a model for notebooks, the command line, servers and tests."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from tokenizers import Tokenizer

from dsv4_jax.arguments import (
    capacity,
    checked_counts,
    checked_integer,
    checked_prompts,
    checked_seed,
    checked_segments,
    checked_stops,
    checked_tokens,
    is_traced,
    refuse_traced,
)
from dsv4_jax.checkpoint.side_files import stop_token_ids, with_tokenizer
from dsv4_jax.config import ModelConfig
from dsv4_jax.inference import generate as generation
from dsv4_jax.inference import speculative, steps
from dsv4_jax.inference.drafters import Draft, draft_problem, rewind_for
from dsv4_jax.inference.text import TextStream, prompt_ids
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import Cache, check_not_consumed, check_sizes, counts_after
from dsv4_jax.model.cache_counts import Counts
from dsv4_jax.model.geometry import allocated_length
from dsv4_jax.model.initial import Network, initial_parameters
from dsv4_jax.model.operations import operations
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import Parameters
from dsv4_jax.placing import MeshLike, RulesLike, placement_of
from pallas_kernels.formats.weights import is_quantized
from sharding.activations import Placement

LOGGER = logging.getLogger(__name__)


class LanguageModel:
    """A model with its parameters, ready to run. Every method is compiled once per shape.

    Methods that take arrays work under `jax.jit`, `jax.grad`, `jax.lax.scan` and the like, with tokens,
    counts, segment ids, caches and parameters traced. Shapes and dtypes are then still checked; the caller
    answers for the values: ids within the vocabulary, counts within T, lengths within the cache.
    `generate` and the streams run a Python loop and cannot be traced.

    On a mesh of several processes (`sharding.processes`) every process calls the same methods in the same
    order with the same values of its host. `generate` and the streams give each of them all tokens; what else
    comes back lies over the devices of all: `sharding.host_values.fetched` brings it to the hosts.

    Args:
        config: the architecture.
        policy: dtypes and numerics.
        parameters: nested dict as `initial_parameters` or `load_checkpoint` return.
        tokenizer: for text in and out; None: token ids only.
        stored: tensor name -> dtype on disk, as loaded; lets `save` write it back unchanged.
        side_files: small files by name, as loaded, for `save`; `tokenizer` decides about tokenizer.json.
        placement: the mesh that the parameters are spread over, and how the model uses it; None: one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        parameters: Parameters,
        tokenizer: Tokenizer | None = None,
        stored: Mapping[str, str] | None = None,
        side_files: Mapping[str, bytes] | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.parameters = parameters
        self.tokenizer = tokenizer
        self.stored = dict(stored or {})
        self.side_files = dict(side_files or {})
        self.placement = placement
        on_mesh = None if placement is None else operations(policy, placement=placement)
        self.network = Network(config, policy, on_mesh)
        self.acceptance: speculative.Acceptance | None = None  # of the drafts of the last generation

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        policy: Policy,
        seed: int = 0,
        *,
        mesh: MeshLike | None = None,
        rules: RulesLike | None = None,
    ) -> "LanguageModel":
        """A model with freshly drawn parameters; `model.initial.initial_parameters` tells the arguments and
        the errors. `mesh` and `rules` place it as in `load`, and change no number."""
        placement = placement_of(mesh, rules)
        where = (None, None) if placement is None else (placement.mesh, placement.table.parameters)
        return cls(config, policy, initial_parameters(config, policy, seed, *where), placement=placement)

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
        return steps.logits(self.network, self.parameters, span)

    def streams(
        self,
        tokens: Int32[Array, "B T"],
        num_valid: Int32[Array, "B"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "L+1 B T N D"]:
        """Residual streams after the embedding and after each layer, compute dtype."""
        span = self._span(tokens, num_valid, segment_ids)
        return steps.streams(self.network, self.parameters, span)

    def layer(
        self, index: int, streams: Float[Array, "B T N D"], tokens: Int32[Array, "B T"]
    ) -> Float[Array, "B T N D"]:
        """The streams after one layer, from given streams before it: `streams` one layer at a time.

        Raises:
            ValueError: for an index outside 0 .. L-1, bad tokens, or streams of another shape.
            TypeError: for a traced index: it chooses the program.
        """
        refuse_traced("index chooses the layer's program", "give an int", index)
        index = checked_integer("index", index, 0, self.config.num_hidden_layers - 1)
        span = self._span(tokens, None, None)
        shape = (*span.ids.shape, self.config.hc_mult, self.config.hidden_size)
        if np.shape(streams) != shape:
            raise ValueError(f"streams of shape {np.shape(streams)} must be [B, T, N, D] = {shape}")
        streams = jnp.asarray(streams, self.policy.compute_dtype)
        return steps.layer(self.network, self.parameters, index, streams, span)

    def taps(
        self,
        tokens: Int32[Array, "B T"],
        collect: Sequence[str],
        num_valid: Int32[Array, "B"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> list[dict[str, jax.Array]]:
        """Intermediate values by layer; names and shapes in `model.transformer.TAPS`.

        Raises:
            ValueError: for unknown names, and as `logits` does.
        """
        if isinstance(collect, str):
            raise ValueError(f"collect={collect!r} must be a list of names: write [{collect!r}]")
        span = self._span(tokens, num_valid, segment_ids)
        return steps.taps(self.network, self.parameters, span, frozenset(collect))

    def mtp_logits(self, tokens: Int32[Array, "B T"]) -> Float32[Array, "B T-1 V"]:
        """Multi-token prediction: row i predicts token i + 2 (report, section 2.1).

        Raises:
            ValueError: if the model has no MTP block, or T < 2.
        """
        if not self.config.num_nextn_predict_layers:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers = 0)")
        span = self._span(tokens, None, None)
        if span.ids.shape[1] < 2:
            raise ValueError(f"tokens of shape {span.ids.shape}: MTP needs at least 2 tokens a row")
        return steps.mtp_logits(self.network, self.parameters, span)

    def _span(self, tokens: Any, num_valid: Any, segment_ids: Any) -> spans.Span:
        ids = checked_tokens(tokens, self.config.vocab_size)
        if segment_ids is None:
            return spans.from_start(ids, jnp.asarray(checked_counts(num_valid, ids.shape)))
        if num_valid is not None:
            raise ValueError("give num_valid or segment_ids, not both")
        return spans.packed(ids, checked_segments(segment_ids, ids.shape))

    # ---- incremental -----------------------------------------------------------------------------

    def new_cache(
        self, batch: int, max_length: int, max_rewind: int = 8, *, mtp: bool = False, dspark: bool = False
    ) -> Cache:
        """An empty cache for `batch` rows of up to `max_length` tokens (see `model.cache.new_cache`).

        Arrays are allocated for the next power of two, so that lengths between two powers share programs;
        `dsv4 inspect --context` shows the bytes. `mtp` adds the slot of the MTP block (`steps.draft`),
        `dspark` that of the DSpark head (`steps.draft_block`).

        Raises:
            ValueError: for sizes that are no integers or out of range, or a slot without such a head.
            TypeError: for traced sizes: they decide shapes.
        """
        sizes = (batch, max_length, max_rewind)
        refuse_traced("the sizes of a cache decide its shapes", "give ints, known before tracing", sizes)
        check_sizes(self.config, *sizes)
        batch, max_length, max_rewind = map(int, sizes)
        allocated, p = allocated_length(self.config, max_length), self.policy
        how = (p.cache_dtype, max_rewind, p.row_dtype, p.cache_format, operations(p).cache_of_bits)
        how = (*how, self.placement)
        more = {"max_length": np.int32(max_length), "stream_dtype": p.compute_dtype if mtp else None}
        more["dspark"] = bool(dspark)
        empty = steps.empty_cache(self.config, batch, allocated, *how, **more)
        return empty.knowing(Counts.empty(batch, max_length))

    def extend(
        self,
        cache: Cache,
        tokens: Int32[Array, "B T"],
        num_valid: Int32[Array, "B"] | None = None,
    ) -> tuple[Float32[Array, "B T V"], Cache]:
        """Appends tokens to each row at its own position. The given cache is consumed (donated): go on
        with the returned one. Under an outer `jax.jit`, donating is up to that.

        Returns while the device works: room is checked by `Cache.counts`. Only tokens and counts that are
        arrays on a device are waited for, and, once, a cache out of a `jax.jit` or the like.

        Args:
            cache: from `new_cache` or an earlier `extend`.
            tokens: i32[B, T], any T >= 1.
            num_valid: i32[B] tokens to append a row, 0..T; the rest is padding and leaves no trace.

        Returns:
            Logits f32[B, T, V] (rows past num_valid mean nothing) and the cache after the call.

        Raises:
            ValueError: if a row would exceed `max_length` (unless lengths or counts are traced), for a cache
                that an earlier call consumed, or for bad tokens or shapes.
        """
        check_not_consumed(cache)
        ids = checked_tokens(tokens, self.config.vocab_size)
        counts = checked_counts(num_valid, ids.shape)
        if ids.shape[0] != len(cache.length):
            raise ValueError(f"tokens have {ids.shape[0]} rows, the cache {len(cache.length)}")
        known = counts_after(cache, counts)
        logits, cache = steps.extend(self.network, self.parameters, cache, ids, jnp.asarray(counts))
        return logits, cache.knowing(known)

    # ---- generation ------------------------------------------------------------------------------

    def generate(
        self,
        tokens: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_p: float = 1.0,
        draft: Draft | None = None,
    ) -> Any:
        """Continues prompts.

        Args:
            tokens: i32[B, T], a list of B id lists of any lengths, or a str (needs a tokenizer). One prompt
                of ids is `[[0, 5, 9]]`. What a str becomes is told in `inference.text`.
            max_new_tokens: at most this many a row, an integer >= 0.
            temperature: 0 is greedy.
            seed: of the draws, an integer in 0 .. 2^63 - 1, or one a row. With one, the rows are different
                requests of that seed; with one a row, each draws what it would draw alone with its seed.
                A draw depends on the request and on the position of its token, not on the batch.
            stop_token_ids: end a row; None means the model's own, () never stops. A stopped row is
                filled up with the stop token it drew.
            top_p: nucleus mass, in (0, 1].
            draft: guess several tokens a step (`inference.drafters`): "mtp" or "dspark", of a model with such
                a head, or "lookup". The tokens are those without, see `inference.speculative` on rounding;
                `last_acceptance` tells how often guesses were right.

        Returns:
            i32[B, max_new_tokens]; for a str prompt the new text, without stop tokens.

        Raises:
            ValueError: for arguments that break a rule above; it names the value and the rule.
            FloatingPointError: for logits that are not finite numbers, by row and position.
            TypeError: for traced arguments or parameters.
        """
        how = (max_new_tokens, temperature, seed, stop_token_ids, top_p, draft)
        if isinstance(tokens, str):
            return "".join(self.stream_text(tokens, *how))
        columns = list(self.stream(tokens, *how))
        batch = len(tokens)
        out = np.stack(columns, axis=1) if columns else np.zeros((batch, 0), np.int32)
        missing = max_new_tokens - out.shape[1]
        return np.concatenate([out, np.repeat(out[:, -1:], missing, axis=1)], axis=1) if missing else out

    def stream(
        self,
        tokens: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_p: float = 1.0,
        draft: Draft | None = None,
    ) -> Iterator[np.ndarray]:
        """As `generate` for ids, yielding i32[B] after each step; arguments are checked at the first."""
        refuse_traced(
            "generation draws its tokens in a Python loop",
            "call it outside, or write the loop with new_cache and extend",
            (tokens, max_new_tokens, temperature, seed, stop_token_ids, top_p, self.parameters),
        )
        prompts = checked_prompts(tokens, self.config.vocab_size)
        max_new_tokens = checked_integer("max_new_tokens", max_new_tokens, 0)
        if stop_token_ids is not None:
            stop_token_ids = checked_stops(stop_token_ids, self.config.vocab_size)
        if problem := draft_problem(draft, self.config):
            raise ValueError(problem)
        needed = max(len(prompt) for prompt in prompts) + max_new_tokens
        size = len(prompts), capacity(needed, self.config), rewind_for(draft, self.config)
        cache = self.new_cache(*size, **({draft: True} if draft in ("mtp", "dspark") else {}))
        how = {"temperature": temperature, "top_p": top_p, "seed": seed}
        how |= {"stop_token_ids": self._stops(stop_token_ids)}
        tokens_of, self.acceptance = generation.stream, None
        if draft is not None:
            tokens_of, self.acceptance = speculative.stream, speculative.Acceptance.of(len(prompts))
            how |= {"draft": draft, "acceptance": self.acceptance}
        yield from tokens_of(self.network, self.parameters, cache, prompts, max_new_tokens, **how)

    def draft_block(
        self, tokens: Any
    ) -> tuple[Int32[Array, "B K"], Float32[Array, "B K V"], Float32[Array, "B K"]]:
        """What the DSpark head expects after the greedy next token (the anchor) of prompts: K ids, without
        that token; their corrected logits; and the raw logits of being accepted. `tokens` as in `generate`.

        Raises:
            ValueError: for a model without such a head, or bad tokens.
        """
        prompts = checked_prompts(tokens, self.config.vocab_size)
        if problem := draft_problem("dspark", self.config):
            raise ValueError(problem)
        cache = self.new_cache(len(prompts), capacity(max(map(len, prompts)), self.config), dspark=True)
        return speculative.draft_block(self.network, self.parameters, cache, prompts)

    @property
    def last_acceptance(self) -> list[list[int]] | None:
        """Of the last generation: for each row, how many drafts became tokens, step by step; None without
        drafts. `acceptance` tells more."""
        return None if self.acceptance is None else self.acceptance.accepted

    def stream_ids(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_p: float = 1.0,
        draft: Draft | None = None,
    ) -> Iterator[int]:
        """Continues one prompt, of text or of ids, yielding new ids up to the stop token, without it. Raises
        ValueError as `generate`, and for text if the model has no tokenizer."""
        if not is_traced(seed):
            seed = checked_seed(seed)  # of one row: no list
        if isinstance(prompt, str):
            ids = prompt_ids(self._text_tokenizer(), prompt, self.config.bos_token_id)
        else:
            ids = prompt
        if stop_token_ids is not None:
            stop_token_ids = checked_stops(stop_token_ids, self.config.vocab_size)
        stops = set(self._stops(stop_token_ids))
        for token in self.stream([ids], max_new_tokens, temperature, seed, stop_token_ids, top_p, draft):
            if int(token[0]) in stops:
                return
            yield int(token[0])

    def stream_text(
        self,
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
        top_p: float = 1.0,
        draft: Draft | None = None,
    ) -> Iterator[str]:
        """Continues text, yielding pieces that are whole characters (see `inference.text`). Raises ValueError
        as `stream_ids`."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a str, not {type(prompt).__name__}: for ids use stream_ids")
        text = TextStream(self._text_tokenizer())
        how = (max_new_tokens, temperature, seed, stop_token_ids, top_p, draft)
        for token in self.stream_ids(prompt, *how):
            if piece := text.add(token):
                yield piece
        if rest := text.finish():
            yield rest

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json: give token ids instead of text")
        return self.tokenizer

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
