"""Tokens travel to the devices that hold their experts, and the sums come back: exchanges of listed rows.

Every device of a group holds `own` experts. A token of another device is sent as a row, once for each of its
experts there, or once for all of them (`shared`): then fewer rows travel, but the operation on one device
keeps places for all Ke experts of every row that it gets, of which most are elsewhere. A row comes back as
one sum.

A device sorts its pairs of token and expert by destination: pairs of one destination are a list. Lists are
sent in chunks of c slots a pair of devices. What is not in the first chunk goes in further ones, as many as
the fullest list of all needs: nothing is dropped, and balanced routing needs one. In front of the rows go
their ids and weights, one small `all_to_all` that also says which slots are in use.

Two ways to move a chunk: `dense` sends every slot, on any backend; `ragged` only those in use, and leaves
garbage in the rest. Slots that are not in use belong to no expert, so nobody reads them. Ragged rows are
taken, moved and added in lanes, [.., D / 128, 128]: each is then whole tiles of a TPU, which otherwise lays
out the buffer anew several times. Dense ones stay [.., D], where nothing is laid out anew. By the compiler's
estimate for v6e (18,432 rows of 4096, forward, XLA's own operations): ragged in lanes 1.6 ms, not so 4.1;
dense in lanes 1.6, not so 0.7.

Gradients are written by hand, for three reasons: the number of chunks is not known when compiling, and JAX
cannot differentiate such a loop; a static number for the worst case would send about n / Ke times the rows;
and rows that nobody wrote must never be multiplied, not even by zero. The backward pass sends the tokens
again, with the gradients of their sums, and sends back the gradients of the tokens. Nothing is saved but the
operands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arithmetic import cdiv, quotient, remainder
from pallas_kernels.formats.blocks import format_of
from sharding.sums import scattered

LANES = 128
"""Numbers of a row of a TPU's tile."""

Experts = Callable[..., Float32[Array, "T D"]]
"""x, gate_up, down, ids, weights, *, valid, repeat, expected_pairs: one device's operation. Its ids are
relative to its experts."""


class Group(NamedTuple):
    """The devices that share the experts.

    Attributes:
        axes: of the mesh, over which the experts are split.
        size: n, how many devices these are.
        own: experts of each.
        all_axes: of the mesh. All devices go round a loop equally often, also those of other groups: a device
            that waits in one collective while others are in another one may wait for ever.
    """

    axes: tuple[str, ...]
    size: int
    own: int
    all_axes: tuple[str, ...]

    def number(self) -> Int32[Array, ""]:
        """Which of them this is."""
        return lax.axis_index(self.axes).astype(jnp.int32)


Move = Callable[[Group, jax.Array, Int32[Array, " n"], Int32[Array, " n"]], jax.Array]
"""group, rows [n, c, ..] by destination, slots in use of each, the same of what comes -> rows by source."""


def dense(group: Group, rows: Float[Array, "n c ..."], sent: Any = None, received: Any = None) -> jax.Array:
    """All slots, in use or not, by `all_to_all`."""
    del sent, received
    return lax.all_to_all(rows, group.axes, 0, 0)


def ragged(group: Group, rows: Float[Array, "n c ..."], sent: jax.Array, received: jax.Array) -> jax.Array:
    """The slots in use, by `ragged_all_to_all`, into memory that is not cleared: others hold anything."""
    n, slots, *rest = rows.shape
    flat = rows.reshape(n * slots, *rest)
    got = lax.ragged_all_to_all(
        flat,
        lax.empty(flat.shape, flat.dtype),
        jnp.arange(n, dtype=jnp.int32) * slots,
        sent,
        jnp.full(n, group.number() * slots, jnp.int32),
        received,
        axis_name=group.axes if len(group.axes) > 1 else group.axes[0],
    )
    return got.reshape(rows.shape)


class Plan(NamedTuple):
    """How the exchanges of one call are cut.

    Attributes:
        group: the devices.
        move: `dense` or `ragged`.
        slots: c, of a chunk, 1 .. t Ke, or t where rows are shared.
        waves: w, a device's experts in as many groups, with an exchange of its own for each.
        shared: whether a row serves all of a token's experts on a device (in one wave).
        narrow: whether sums come back, and their gradients go, in the dtype of the tokens instead of float32.
    """

    group: Group
    move: Move
    slots: int
    waves: int = 1
    shared: bool = False
    narrow: bool = False

    def longest(self, tokens: int, top_k: int) -> int:
        """Slots of the longest list there can be."""
        return tokens if self.shared else tokens * top_k

    def without_waves(self, tokens: int, top_k: int) -> "Plan":
        """The same rows in one exchange."""
        slots = min(self.slots * self.waves, self.longest(tokens, top_k))
        return self._replace(waves=1, slots=slots)


class Lists(NamedTuple):
    """What a device sends: a list for each wave and destination, number wave * n + device.

    Attributes:
        order: i32[t Ke] numbers of pairs, token * Ke + k, by list; pairs of no list stand last.
        first: i32[w n + 1] where each list begins; at the end, where the last one ends.
        list_of: i32[t, Ke] of every pair; w n: none.
        slot: i32[t, Ke] place in its list of the row that serves the pair.
        leads: bool[t, Ke] pairs for whose sake the row is in the list: all, or one of those that share it.
    """

    order: Int32[Array, " P"]
    first: Int32[Array, " lists"]
    list_of: Int32[Array, "t Ke"]
    slot: Int32[Array, "t Ke"]
    leads: Bool[Array, "t Ke"]


def lists_of(ids: Int32[Array, "t Ke"], plan: Plan) -> Lists:
    """The lists of this device's tokens; ids over all experts, below 0 for none."""
    group, (tokens, top_k) = plan.group, ids.shape
    pairs, count = tokens * top_k, plan.waves * group.size
    device = quotient(ids, group.own)
    wave = quotient(remainder(ids, group.own), group.own // plan.waves)
    list_of = jnp.where(ids >= 0, wave * group.size + device, count)
    leads, leader = list_of < count, jnp.arange(top_k, dtype=jnp.int32)
    if plan.shared:
        leader = (list_of[:, :, None] == list_of[:, None, :]).argmax(axis=-1).astype(jnp.int32)
        leads &= leader == jnp.arange(top_k, dtype=jnp.int32)

    pair = jnp.arange(pairs, dtype=jnp.int32)
    keys = lax.sort(jnp.where(leads, list_of, count).reshape(-1) * pairs + pair, is_stable=False)
    # All compared with all, one operation: searching by halves is a loop of small ones, dearer on a TPU.
    bounds = jnp.arange(count + 1, dtype=jnp.int32) * pairs
    first = jnp.searchsorted(keys, bounds, method="compare_all").astype(jnp.int32)
    order = remainder(keys, pairs)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(pair, unique_indices=True).reshape(ids.shape)
    place = jnp.take_along_axis(place, jnp.broadcast_to(leader, ids.shape), axis=1)
    slot = place - first.at[list_of].get(mode="promise_in_bounds")
    return Lists(order, first, list_of, slot, leads)


class Chunk(NamedTuple):
    """Slots start .. start + c - 1 of the lists of one wave."""

    plan: Plan
    lists: Lists
    wave: Int32[Array, ""]
    start: Int32[Array, ""]

    @property
    def sent(self) -> Int32[Array, " n"]:
        """Slots in use, by destination."""
        number = self.wave * self.plan.group.size
        first = lax.dynamic_slice_in_dim(self.lists.first, number, self.plan.group.size + 1)
        return jnp.clip(first[1:] - first[:-1] - self.start, 0, self.plan.slots)

    @property
    def pairs(self) -> Int32[Array, "n c"]:
        """The pair in every slot; t Ke where none is."""
        number = self.wave * self.plan.group.size
        first = lax.dynamic_slice_in_dim(self.lists.first, number, self.plan.group.size)
        slot = jnp.arange(self.plan.slots, dtype=jnp.int32)
        none = self.lists.order.size
        pair = self.lists.order.at[first[:, None] + self.start + slot].get(mode="fill", fill_value=none)
        return jnp.where(slot < self.sent[:, None], pair, none)

    def rows(self, values: Float[Array, "T ..."]) -> Float[Array, "n c ..."]:
        """The rows of tokens to send; any row in slots that are not in use."""
        token = quotient(self.pairs, self.lists.slot.shape[1])
        return values.at[jnp.minimum(token, len(values) - 1)].get(mode="promise_in_bounds")

    def choices(self, ids: Int32[Array, "t Ke"], weights: Float32[Array, "t Ke"]) -> Float32[Array, "n c 2m"]:
        """m weights of every row, and as many ids relative to the destination's experts, -1 for none."""
        own, own_list = self.plan.group.own, self.wave * self.plan.group.size
        pair = self.pairs
        if not self.plan.shared:
            weight = weights.reshape(-1).at[pair].get(mode="fill", fill_value=0)[..., None]
            chosen = ids.reshape(-1).at[pair].get(mode="fill", fill_value=-1)[..., None]
        else:
            token = quotient(pair, ids.shape[1])
            weight = weights.at[token].get(mode="fill", fill_value=0)
            chosen = ids.at[token].get(mode="fill", fill_value=-1)
            here = own_list + jnp.arange(self.plan.group.size, dtype=jnp.int32)
            none = self.plan.waves * self.plan.group.size
            in_list = self.lists.list_of.at[token].get(mode="fill", fill_value=none) == here[:, None, None]
            chosen = jnp.where(in_list, chosen, -1)
        chosen = jnp.where(chosen >= 0, remainder(chosen, own), -1)
        return jnp.concatenate([weight.astype(jnp.float32), chosen.astype(jnp.float32)], axis=-1)

    def at(self) -> tuple[Int32[Array, "t Ke"], Bool[Array, "t Ke"]]:
        """Where in [n * c] the row of each pair is, and whether it is in this chunk."""
        n, slots = self.plan.group.size, self.plan.slots
        device = self.lists.list_of - self.wave * n
        slot = self.lists.slot - self.start
        here = (device >= 0) & (device < n) & (slot >= 0) & (slot < slots)
        return jnp.where(here, device * slots + slot, 0), here


class Arrived(NamedTuple):
    """Ids [n c, m], weights [n c, m] and slots in use [n] of the rows that come to this device."""

    ids: Int32[Array, "rows m"]
    weights: Float32[Array, "rows m"]
    received: Int32[Array, " n"]

    @classmethod
    def of(cls, choices: Float32[Array, "n c 2m"]) -> "Arrived":
        """From what `Chunk.choices` of all devices became."""
        weights, ids = jnp.split(choices, 2, axis=-1)
        ids = ids.astype(jnp.int32)
        received = (ids >= 0).any(axis=-1).sum(axis=-1, dtype=jnp.int32)
        flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
        return cls(flat(ids), flat(weights), received)

    @property
    def used(self) -> Bool[Array, " rows"]:
        """Which rows there are."""
        return (self.ids >= 0).any(axis=-1)


def in_lanes(rows: Float[Array, "rows D"]) -> Float[Array, "rows ..."]:
    """[rows, D / 128, 128], where D is so divided."""
    width = rows.shape[1]
    return rows if width % LANES else rows.reshape(-1, width // LANES, LANES)


def summed(parts: Float[Array, "rows ..."], at: jax.Array, counts: jax.Array) -> Float32[Array, "t D"]:
    """Each token's sum of the rows of its pairs, in their order: gathered, so the same on every backend."""
    total = jnp.zeros((len(at), *parts.shape[1:]), jnp.float32)
    for k in range(at.shape[1]):
        part = parts.at[at[:, k]].get(mode="promise_in_bounds").astype(jnp.float32)
        total += jnp.where(jnp.expand_dims(counts[:, k], range(1, part.ndim)), part, 0)
    return total.reshape(len(at), -1)


def exchanged(experts: Experts, plan: Plan) -> Callable[..., Float32[Array, "t D"]]:
    """The experts of a group for this device's tokens, inside a shard_map over all axes of the mesh.

    Where lists may be longer than a chunk, there is memory for one more set of float32 gradients of the
    device's experts in the backward pass. Waves are of the forward pass alone: gradients of weights are made
    once.

    Args:
        experts: the operation on one device.
        plan: how rows travel.

    Returns:
        A function of x [t, D], gate_up and down of this device, ids i32[t, Ke] over all experts (below 0:
        none), weights f32[t, Ke], and repeat. It has gradients of x, gate_up, down and weights.
    """
    group = plan.group
    form = in_lanes if plan.move is ragged else lambda rows: rows

    def sent_as(x):
        return x.dtype if plan.narrow else jnp.float32

    def there(chunk, arrived, values):
        rows = plan.move(group, chunk.rows(form(values)), chunk.sent, arrived.received)
        return rows.reshape(-1, values.shape[1])

    def back(chunk, arrived, rows):
        rows = form(rows)
        apart = rows.reshape(group.size, chunk.plan.slots, *rows.shape[1:])
        return plan.move(group, apart, arrived.received, chunk.sent).reshape(rows.shape)

    def number_of_chunks(plan, lists):
        fullest = lax.pmax((lists.first[1:] - lists.first[:-1]).max(), group.all_axes)
        return quotient(fullest + (plan.slots - 1), plan.slots)

    def chunk_at(plan, lists, wave, number):
        start = jnp.asarray(number * plan.slots, jnp.int32)
        return Chunk(plan, lists, jnp.asarray(wave, jnp.int32), start)

    def forward(x, gate_up, down, ids, weights, repeat):
        lists = lists_of(ids, plan)

        def part(chunk, arrived):
            rows = there(chunk, arrived, x)
            how = {"valid": arrived.used, "repeat": repeat, "expected_pairs": cdiv(ids.size, plan.waves)}
            y = experts(rows, gate_up, down, arrived.ids, arrived.weights, **how)
            return back(chunk, arrived, y.astype(sent_as(x)))

        # The first chunks of all waves: chains that do not depend on each other, so that they may overlap.
        first = [chunk_at(plan, lists, wave, 0) for wave in range(plan.waves)]
        choices = dense(group, jnp.concatenate([chunk.choices(ids, weights) for chunk in first], axis=1))
        arrived = [Arrived.of(piece) for piece in jnp.split(choices, plan.waves, axis=1)]
        parts = [part(chunk, own) for chunk, own in zip(first, arrived, strict=True)]
        at, here = map(jnp.stack, zip(*(chunk.at() for chunk in first), strict=True))
        behind = jnp.arange(plan.waves, dtype=jnp.int32)[:, None, None] * len(parts[0])
        at = jnp.where(here, at + behind, 0).sum(axis=0, dtype=jnp.int32)
        y = summed(jnp.concatenate(parts), at, here.any(axis=0) & lists.leads)
        if plan.slots >= plan.longest(*ids.shape):
            return y

        def more(step, y):
            chunk = chunk_at(plan, lists, remainder(step, plan.waves), 1 + quotient(step, plan.waves))
            at, here = chunk.at()
            parts = part(chunk, Arrived.of(dense(group, chunk.choices(ids, weights))))
            return y + summed(parts, at, here & lists.leads)

        steps = (number_of_chunks(plan, lists) - 1) * plan.waves
        return lax.fori_loop(jnp.int32(0), steps, more, y)

    def backward(saved, dy):
        x, gate_up, down, ids, weights, repeat = saved
        once = plan.without_waves(*ids.shape)
        lists = lists_of(ids, once)
        matrices = {"gate_up": gate_up, "down": down}
        plain = {name: own for name, own in matrices.items() if format_of(own) == "plain"}

        def part(number):
            chunk = chunk_at(once, lists, 0, number)
            arrived = Arrived.of(dense(group, chunk.choices(ids, weights)))

            def call(rows, weights, plain):
                own = matrices | plain
                how = {"valid": arrived.used, "repeat": repeat, "expected_pairs": ids.size}
                return experts(rows, own["gate_up"], own["down"], arrived.ids, weights, **how)

            _, pull = jax.vjp(call, there(chunk, arrived, x), arrived.weights, plain)
            # Rows that nobody wrote hold anything.
            d_y = there(chunk, arrived, dy.astype(sent_as(x))).astype(dy.dtype)
            d_rows, d_weights, d_plain = pull(jnp.where(arrived.used[:, None], d_y, 0))
            at, here = chunk.at()
            dx = summed(back(chunk, arrived, d_rows), at, here & lists.leads)
            d_weights = dense(group, d_weights.reshape(group.size, once.slots, -1))
            d_weights = d_weights.reshape(-1, d_weights.shape[-1])
            column = jnp.arange(ids.shape[1], dtype=jnp.int32) if plan.shared else 0
            d_weights = jnp.where(here, d_weights.at[at, column].get(mode="promise_in_bounds"), 0)
            return dx, d_weights, d_plain

        sums = part(0)
        if once.slots < once.longest(*ids.shape):
            chunks = number_of_chunks(once, lists)

            def more(sums):
                # In float32 until the last one is added; only here, because it copies all gradients.
                wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)  # noqa: E731
                add = lambda number, total: jax.tree.map(jnp.add, total, wide(part(number)))  # noqa: E731
                total = lax.fori_loop(jnp.int32(1), chunks, add, wide(sums))
                return jax.tree.map(lambda a, own: a.astype(own.dtype), total, sums)

            sums = lax.cond(chunks > 1, more, lambda sums: sums, sums)
        dx, d_weights, d_plain = sums
        d_weights = d_weights.astype(weights.dtype)
        return dx.astype(x.dtype), d_plain.get("gate_up"), d_plain.get("down"), None, d_weights, None

    run = jax.custom_vjp(forward)
    run.defvjp(lambda *operands: (forward(*operands), operands), backward)
    return run


def gathered(x: Float[Array, "t D"], axes: tuple[str, ...]) -> Float[Array, "n*t D"]:
    """The tokens of all devices along some axes; their gradients are added in float32."""
    if not axes:
        return x

    @jax.custom_vjp
    def gather(x):
        return lax.all_gather(x, axes, tiled=True)

    def pull(_, dy):
        return (scattered(dy.astype(jnp.float32), axes).astype(dy.dtype),)

    gather.defvjp(lambda x: (gather(x), None), pull)
    return gather(x)
