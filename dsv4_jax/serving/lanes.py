"""Prompts: computed chunk by chunk in lanes, with what is known of them taken from the prefix cache."""

import functools
from collections.abc import Sequence as Many

import jax
import numpy as np

from dsv4_jax.inference import steps
from dsv4_jax.inference.drafters import rewind_for
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import cache_blocks, cache_rows
from dsv4_jax.model.cache import Cache
from dsv4_jax.serving.fingerprint import model_fingerprint
from dsv4_jax.serving.prefix_cache import Key, PrefixCache
from dsv4_jax.serving.prefix_disk import PrefixDisk, PrefixWriter, Shapes
from dsv4_jax.serving.scheduler import Chunk, Sequence
from dsv4_jax.serving.settings import EngineSettings

LOADED_AT_ONCE = 8
"""Pages that one call copies into a row."""


def rows_for(lm: LanguageModel, settings: EngineSettings, num_rows: int) -> Cache:
    """An empty cache with the slot of the head that drafts."""
    draft = settings.draft
    rewind = rewind_for(draft, lm.config)
    heads = {"mtp": draft == "mtp", "dspark": draft == "dspark"}
    return lm.new_cache(num_rows, settings.max_length, rewind, **heads)


class Lanes:
    """A cache with a row a lane, the logits after each row, and the pages of known prefixes.

    Args:
        lm: the model. settings: of the engine.
        block: tokens of a chunk and of a page.
    """

    def __init__(self, lm: LanguageModel, settings: EngineSettings, block: int) -> None:
        self._lm, self._settings, self.block = lm, settings, block
        self.cache = rows_for(lm, settings, settings.num_lanes)
        empty = np.zeros((settings.num_lanes, lm.config.vocab_size), np.float32)
        self.logits: jax.Array = lm.network.put(empty, "B V")
        self.prefixes: PrefixCache[cache_blocks.State] | None = None
        if settings.num_pages:
            self._pool = cache_blocks.new_pool(
                self.cache, lm.config, settings.num_pages, block, lambda x: lm.network.put(x, "")
            )
            weighed = settings.disk is not None
            fingerprint = model_fingerprint(lm, settings.draft, with_weights=weighed)
            self.prefixes = PrefixCache(settings.num_pages, settings.num_states, block, fingerprint)
        self._writer = self._disk = None
        if self.prefixes is not None and settings.disk is not None:
            page = jax.eval_shape(cache_blocks.read_page, self._pool, np.int32(0))
            state = jax.eval_shape(cache_blocks.take_state, self.cache, np.int32(0))
            self._state_tree = jax.tree.structure(state)
            self._disk = PrefixDisk(settings.disk, settings.disk_bytes, Shapes.of(page), Shapes.of(state))
            self._writer = PrefixWriter(self._disk)

    def begin(self, sequence: Sequence) -> None:
        """Empties the sequence's lane, or fills it with what is known of its prompt."""
        self.cache = cache_rows.reset(self.cache, [sequence.lane])
        if self.prefixes is None:
            return
        keys = self.prefixes.keys(sequence.prompt, sequence.salt)
        # At least one token is computed: there must be logits.
        usable = keys[: (len(sequence.prompt) - 1) // self.block]
        if self._disk is not None:
            self._read_from_disk(usable)
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
                self._write_to_disk(sequence.keys[:block], state)

    def _write_to_disk(self, keys: Many[Key], state: cache_blocks.State) -> None:
        """Asks for the files of a prefix that has a state now, if there is a folder for them."""
        if self._writer is None or self._disk is None:
            return
        pages = self.prefixes.pages(keys)
        for key, page in zip(keys, pages, strict=True):
            if not self._writer.has("block", key):
                self._writer.add("block", key, cache_blocks.read_page(self._pool, np.int32(page)))
        self._writer.add("state", keys[-1], state)

    def _read_from_disk(self, keys: Many[Key]) -> None:
        """Makes what is on disk of a prefix known, if that is more than is known already."""
        held = self.prefixes.known(keys)
        best = self.prefixes.best(keys)
        for number in range(self._disk.reach(keys, held), best, -1):
            if not self._disk.has("state", keys[number - 1]):
                continue
            leaves = self._disk.read("state", keys[number - 1])
            blocks = [self._disk.read("block", key) for key in keys[held:number]]
            if leaves is None or any(block is None for block in blocks):
                continue
            for at, block in enumerate(blocks, start=held):
                page = self.prefixes.insert(keys, at)
                if page is None:
                    return  # no room
                self._pool = cache_blocks.write_page(self._pool, np.int32(page), tuple(block))
            state = jax.tree.unflatten(self._state_tree, leaves)
            put = functools.partial(self._lm.network.put, dims="")
            self.prefixes.attach(keys[number - 1], jax.tree.map(put, state))
            return

    def forget(self) -> None:
        """Empties the prefix cache, when all that should be on disk is there."""
        if self._writer is not None:
            self._writer.flush()
        if self.prefixes is not None:
            self.prefixes.clear()

    def close(self) -> None:
        """Waits until everything that should be on disk is there."""
        if self._writer is not None:
            self._writer.close()
