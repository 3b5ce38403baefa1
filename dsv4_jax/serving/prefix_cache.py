"""Which prefixes are kept, by the hash of their tokens, and which goes when there is no room.

A node is a block of tokens behind a certain prefix: its key is a BLAKE2 hash over the key before it and the
block's ids, beginning with the tenant's salt and the fingerprint of the model. It has the page that holds
the block's entries, and perhaps the *state* at the block's end (`model.cache_blocks`). Only a node with a
state is a hit: pages alone lack the window and the recent rows (report, section 3.5).

This class counts and decides on the host. Copies on the device are its user's, in the order of its answers:
pages are copied into a sequence's row, so a node may go as soon as the copy was asked for.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

S = TypeVar("S")

Key = bytes

KEY_BYTES = 32


class Hit(NamedTuple, Generic[S]):
    """A prefix that need not be computed again."""

    num_blocks: int
    pages: tuple[int, ...]
    state: S


@dataclasses.dataclass
class _Node(Generic[S]):
    parent: Key | None
    page: int
    children: int = 0
    state: S | None = None


class PrefixCache(Generic[S]):
    """Nodes, least recently used first out.

    Args:
        num_pages: blocks that there is room for.
        num_states: states that are kept at most.
        block: tokens of a block.
        fingerprint: of everything that decides what a block holds: weights, numerics, cache format.
    """

    def __init__(self, num_pages: int, num_states: int, block: int, fingerprint: bytes) -> None:
        self.block = block
        self._root = hashlib.blake2b(fingerprint, digest_size=KEY_BYTES).digest()
        self._num_states = num_states
        self._free = list(range(num_pages - 1, -1, -1))
        self._nodes: collections.OrderedDict[Key, _Node[S]] = collections.OrderedDict()
        self._states: collections.OrderedDict[Key, None] = collections.OrderedDict()
        self.queries = self.hits = self.evictions = 0  # tokens asked for, tokens found, blocks that went

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_states(self) -> int:
        """States that are kept."""
        return len(self._states)

    def keys(self, ids: Sequence[int], salt: bytes = b"") -> list[Key]:
        """The key of every whole block of these tokens, in the tenant's own space."""
        key = hashlib.blake2b(salt, key=self._root, digest_size=KEY_BYTES).digest()
        words, found = np.asarray(ids, "<u4"), []
        for start in range(0, len(ids) - self.block + 1, self.block):
            piece = words[start : start + self.block].tobytes()
            key = hashlib.blake2b(key + piece, digest_size=KEY_BYTES).digest()
            found.append(key)
        return found

    def known(self, keys: Sequence[Key]) -> int:
        """How many of the first blocks have a page, whether or not there is a state."""
        return next((number for number, key in enumerate(keys) if key not in self._nodes), len(keys))

    def pages(self, keys: Sequence[Key]) -> list[int]:
        """The pages of these blocks, all of which must be known."""
        return [self._nodes[key].page for key in keys]

    def best(self, keys: Sequence[Key]) -> int:
        """How many blocks `longest` would find. Nothing counts as used."""
        for number in range(self.known(keys), 0, -1):
            if self._nodes[keys[number - 1]].state is not None:
                return number
        return 0

    def longest(self, keys: Sequence[Key], num_tokens: int) -> Hit[S] | None:
        """The longest known prefix with a state, which then counts as used; None: there is none.

        Args:
            keys: of the blocks that may be taken from here.
            num_tokens: of the whole prompt, for the count of queries.
        """
        self.queries += num_tokens
        number = self.best(keys)
        if not number:
            return None
        last = keys[number - 1]
        state = self._nodes[last].state
        assert state is not None
        self._touch(last)
        self._states.move_to_end(last)
        self.hits += number * self.block
        return Hit(number, tuple(self.pages(keys[:number])), state)

    def insert(self, keys: Sequence[Key], number: int) -> int | None:
        """Makes block `number` of a chain known: the page to copy it to, or None if there is nothing to copy.

        That is so when it is known already, when the block before it went, or when there is no room but in
        its own prefix.
        """
        key = keys[number]
        if key in self._nodes:
            self._touch(key)
            return None
        parent = keys[number - 1] if number else None
        if parent is not None:
            if parent not in self._nodes:
                return None
            self._touch(parent)
        if not self._free and not self._evict_one(parent):
            return None
        page = self._free.pop()
        self._nodes[key] = _Node(parent, page)
        if parent is not None:
            self._nodes[parent].children += 1
        self._touch(key)
        return page

    def wants_state(self, key: Key) -> bool:
        """Whether a node is there and has no state."""
        node = self._nodes.get(key)
        return node is not None and node.state is None and self._num_states > 0

    def attach(self, key: Key, state: S) -> None:
        """Gives a node its state; the state that was used least lately may go."""
        if not self.wants_state(key):
            return
        if len(self._states) >= self._num_states:
            oldest, _ = self._states.popitem(last=False)
            self._nodes[oldest].state = None
        self._nodes[key].state = state
        self._states[key] = None

    def clear(self) -> None:
        """Forgets everything."""
        while self._evict_one(None):
            pass

    def _touch(self, key: Key) -> None:
        # From the leaf to the root: no node is ever older than one behind it, so the oldest is a leaf.
        for each in self._chain(key):
            self._nodes.move_to_end(each)

    def _chain(self, key: Key | None) -> Iterator[Key]:
        while key is not None:
            yield key
            key = self._nodes[key].parent

    def _evict_one(self, wanted: Key | None) -> bool:
        """Frees the oldest node's page, unless that is `wanted`."""
        oldest = next(iter(self._nodes), None)
        if oldest is None or oldest == wanted:
            return False
        node = self._nodes.pop(oldest)
        self._states.pop(oldest, None)
        if node.parent is not None:
            self._nodes[node.parent].children -= 1
        self._free.append(node.page)
        self.evictions += 1
        return True

    def check(self) -> None:
        """Raises AssertionError if pages, children or states do not add up: for tests."""
        pages = [node.page for node in self._nodes.values()]
        assert len(set(pages)) == len(pages) and not set(pages) & set(self._free)
        children: collections.Counter[Key] = collections.Counter()
        for node in self._nodes.values():
            if node.parent is not None:
                assert node.parent in self._nodes
                children[node.parent] += 1
        assert all(node.children == children[key] for key, node in self._nodes.items())
        assert {key for key, node in self._nodes.items() if node.state is not None} == set(self._states)
        assert len(self._states) <= self._num_states
