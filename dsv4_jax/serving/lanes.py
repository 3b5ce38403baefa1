"""Prompts: computed chunk by chunk in lanes, with what is known of them taken from the prefix cache."""

import hashlib
from collections.abc import Sequence as Many

import jax
import numpy as np

from dsv4_jax.inference import steps
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import cache_blocks, cache_rows
from dsv4_jax.serving.prefix_cache import PrefixCache
from dsv4_jax.serving.scheduler import Chunk, Sequence
from dsv4_jax.serving.settings import EngineSettings

LOADED_AT_ONCE = 8
"""Pages that one call copies into a row."""


class Lanes:
    """A cache with a row a lane, the logits after each row, and the pages of known prefixes.

    Args:
        lm: the model. settings: of the engine.
        block: tokens of a chunk and of a page.
    """

    def __init__(self, lm: LanguageModel, settings: EngineSettings, block: int) -> None:
        self._lm, self._settings, self.block = lm, settings, block
        self.cache = lm.new_cache(settings.num_lanes, settings.max_length)
        empty = np.zeros((settings.num_lanes, lm.config.vocab_size), np.float32)
        self.logits: jax.Array = lm.network.put(empty, "B V")
        self.prefixes: PrefixCache[cache_blocks.State] | None = None
        if settings.num_pages:
            self._pool = cache_blocks.new_pool(
                self.cache, lm.config, settings.num_pages, block, lambda x: lm.network.put(x, "")
            )
            fingerprint = hashlib.blake2b(repr((lm.config, lm.policy)).encode()).digest()
            self.prefixes = PrefixCache(settings.num_pages, settings.num_states, block, fingerprint)

    def begin(self, sequence: Sequence) -> None:
        """Empties the sequence's lane, or fills it with what is known of its prompt."""
        self.cache = cache_rows.reset(self.cache, [sequence.lane])
        if self.prefixes is None:
            return
        keys = self.prefixes.keys(sequence.prompt, sequence.salt)
        # At least one token is computed: there must be logits.
        usable = keys[: (len(sequence.prompt) - 1) // self.block]
        hit = self.prefixes.longest(usable, len(sequence.prompt))
        every = max(self._settings.state_interval // self.block, 1)
        # Where prompts part, at this prompt's end, and along a long one.
        wanted = {self.prefixes.known(usable), len(usable), *range(every, len(keys) + 1, every)}
        sequence.keys, sequence.states_at = keys, frozenset(wanted - {0})
        if hit is None:
            return
        lane = np.int32(sequence.lane)
        for first in range(0, hit.num_blocks, LOADED_AT_ONCE):
            pages = np.full(LOADED_AT_ONCE, -1, np.int32)
            some = hit.pages[first : first + LOADED_AT_ONCE]
            pages[: len(some)] = some
            self.cache = cache_blocks.load_blocks(
                self._lm.config, self.block, self.cache, lane, np.int32(first), self._pool, pages
            )
        self.cache = cache_blocks.put_state(self.cache, lane, hit.state)
        sequence.done = sequence.cached = hit.num_blocks * self.block

    def append(self, chunks: Many[Chunk]) -> None:
        """Starts the computation of these chunks, one a lane, and keeps the blocks that they complete."""
        shape = (self._settings.num_lanes, self.block)
        tokens, num_valid = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for chunk in chunks:
            lane = chunk.sequence.lane
            tokens[lane, : chunk.count] = chunk.sequence.prompt[chunk.start : chunk.start + chunk.count]
            num_valid[lane] = chunk.count
        network = self._lm.network
        given = network.put(tokens, "B"), network.put(num_valid, "B")
        self.logits, self.cache = steps.prefill(network, self._lm.parameters, self.cache, *given, self.logits)
        for chunk in chunks:
            chunk.sequence.done += chunk.count
        self._keep([chunk.sequence for chunk in chunks if chunk.sequence.done % self.block == 0])

    def _keep(self, sequences: Many[Sequence]) -> None:
        """Makes the blocks that just became complete known, and their states where they are wanted."""
        if self.prefixes is None or not sequences:
            return
        nowhere = self._settings.num_pages
        number = np.zeros(self._settings.num_lanes, np.int32)
        pages = np.full(self._settings.num_lanes, nowhere, np.int32)
        for sequence in sequences:
            block = sequence.done // self.block - 1
            page = self.prefixes.insert(sequence.keys, block)
            if page is not None:
                number[sequence.lane], pages[sequence.lane] = block, page
        if (pages < nowhere).any():
            self._pool = cache_blocks.save_blocks(
                self._lm.config, self.block, self._pool, self.cache, number, pages
            )
        for sequence in sequences:
            block = sequence.done // self.block
            key = sequence.keys[block - 1]
            if block in sequence.states_at and self.prefixes.wants_state(key):
                state = cache_blocks.take_state(self.cache, np.int32(sequence.lane))
                self.prefixes.attach(key, state)
