"""Tokens travel to the devices that hold their experts, and the sums come back: exchanges of listed rows.

Every device of a group holds `own` experts, and knows from one gather what all of the group's tokens chose.
So both ends of an exchange make the same lists on their own: the tokens of device s with an expert on device
d, in order. A row travels once to a device, whatever number of its experts live there; it comes back as one
sum. Lists are sent in chunks of c slots a pair of devices. What is not in the first chunk goes in further
ones, as many as the fullest list of all needs: nothing is dropped, and balanced routing needs one.

Two ways to move a chunk [n, c, ...]: `dense` sends every slot, on any backend; `ragged` only those in use,
and leaves garbage in the rest. Slots that are not in use belong to no expert, so nobody reads them.

Gradients are written by hand, for three reasons: the number of chunks is not known when compiling, and JAX
cannot differentiate such a loop; a static number for the worst case would send about n / Ke times the rows;
and rows that nobody wrote must never be multiplied, not even by zero. The backward pass sends the tokens
again, with the gradients of their sums, and sends back the gradients of the tokens. Nothing is saved but the
operands.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arithmetic import quotient, round_up
from pallas_kernels.formats.blocks import format_of

LANES = 128
"""Numbers of a row of a TPU's tile."""

Experts = Callable[..., Float32[Array, "T D"]]
"""x, gate_up, down, ids, weights, *, valid, repeat: one device's operation, ids relative to its experts."""


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
"""group, rows [n, c, ...] by destination, slots in use of each, the same of what comes -> rows by source."""


def dense(group: Group, rows: Float[Array, "n c *C"], sent: jax.Array, received: jax.Array) -> jax.Array:
    """All slots, in use or not, by `all_to_all`."""
    del sent, received
    return lax.all_to_all(rows, group.axes, 0, 0)


def ragged(group: Group, rows: Float[Array, "n c *C"], sent: jax.Array, received: jax.Array) -> jax.Array:
    """The slots in use, by `ragged_all_to_all`, into memory that is not cleared: others hold anything at all.

    Rows are laid out in lanes: otherwise a TPU lays the whole buffer out anew before and after.
    """
    n, slots, *rest = rows.shape
    lanes = [rest[0] // LANES, LANES] if rest[0] % LANES == 0 else rest
    flat = rows.reshape(n * slots, *lanes)
    first = jnp.arange(n, dtype=jnp.int32) * slots
    got = lax.ragged_all_to_all(
        flat,
        lax.empty(flat.shape, flat.dtype),
        first,
        sent,
        jnp.full(n, group.number() * slots, jnp.int32),
        received,
        axis_name=group.axes if len(group.axes) > 1 else group.axes[0],
    )
    return got.reshape(rows.shape)


class Lists(NamedTuple):
    """Which rows travel. A list has `slots` places, of which the first ones are in use.

    Attributes:
        out: i32[n, slots] the own token in every place of the list for each device; t where none is.
        into: i32[n, slots] row s * t + token of the group's in every place of device s's list for this one;
            n * t where none is.
        sent: i32[n] places in use of `out`.
        received: i32[n] places in use of `into`.
        device: i32[t, Ke] where the sum that holds the pair's part comes from.
        slot: i32[t, Ke] its place in that device's list; -1 where there is none, or an earlier pair names it.
    """

    out: Int32[Array, "n slots"]
    into: Int32[Array, "n slots"]
    sent: Int32[Array, " n"]
    received: Int32[Array, " n"]
    device: Int32[Array, "t Ke"]
    slot: Int32[Array, "t Ke"]


def lists_of(ids: Int32[Array, "n t Ke"], group: Group, wave: "Wave", slots: int) -> Lists:
    """The lists of one wave.

    Args:
        ids: what all tokens of the group chose, by device; -1 for nothing.
        group: of this device.
        wave: which experts of each device count.
        slots: of a list, at least t.
    """
    n, tokens, top_k = ids.shape
    me = group.number()
    device = quotient(ids, group.own)
    device = jnp.where((ids >= 0) & wave.has(ids - device * group.own), device, n)
    mine = lax.dynamic_index_in_dim(device, me, keepdims=False)
    every = jnp.arange(n, dtype=jnp.int32)
    goes = (mine == every[:, None, None]).any(-1)  # to device, token
    comes = (device == me).any(-1)  # from device, token

    def listed(which, of_row, none):
        token = jnp.arange(tokens, dtype=jnp.int32)
        token = lax.sort(jnp.where(which, token, tokens), dimension=1)
        row = jnp.where(token < tokens, token + of_row[:, None], none)
        return jnp.pad(row, ((0, 0), (0, slots - tokens)), constant_values=none)

    place = jnp.cumsum(goes, axis=1, dtype=jnp.int32) - 1
    own_token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    slot = place.at[jnp.minimum(mine, n - 1), own_token].get(mode="promise_in_bounds")
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    again = ((mine[:, :, None] == mine[:, None, :]) & earlier).any(-1)
    return Lists(
        listed(goes, jnp.zeros_like(every), tokens),
        listed(comes, every * tokens, n * tokens),
        goes.sum(axis=1, dtype=jnp.int32),
        comes.sum(axis=1, dtype=jnp.int32),
        jnp.minimum(mine, n - 1),
        jnp.where((mine < n) & ~again, slot, -1),
    )


class Wave(NamedTuple):
    """Experts first .. first + count - 1 of every device."""

    first: Int32[Array, ""] | int
    count: int

    def has(self, own_id: jax.Array) -> jax.Array:
        """Whether ids relative to a device's experts are among them."""
        return (own_id >= self.first) & (own_id < self.first + self.count)


class Chunk(NamedTuple):
    """A range of slots of every list, and how to move it."""

    lists: Lists
    group: Group
    move: Move
    start: Int32[Array, ""]
    slots: int

    def _piece(self, lists):
        return lax.dynamic_slice_in_dim(lists, self.start, self.slots, axis=1)

    def _used(self, total):
        return jnp.clip(total - self.start, 0, self.slots)

    @property
    def rows(self) -> Int32[Array, " n*c"]:
        """Which of the group's rows arrives in every slot; n * t where none does."""
        return self._piece(self.lists.into).reshape(-1)

    def there(self, values: Float[Array, "t C"]) -> Float[Array, "n*c C"]:
        """The own tokens' rows to where their experts are; what arrived."""
        out = values.at[self._piece(self.lists.out)].get(mode="fill", fill_value=0)
        sent, received = self._used(self.lists.sent), self._used(self.lists.received)
        return self.move(self.group, out, sent, received).reshape(-1, values.shape[1])

    def back(self, rows: Float[Array, "n*c C"]) -> Float32[Array, "t C"]:
        """Rows back to whose tokens they are; each token's sum of them, in the order of its pairs."""
        sent, received = self._used(self.lists.received), self._used(self.lists.sent)
        apart = rows.reshape(self.group.size, self.slots, -1)
        parts = self.move(self.group, apart, sent, received).reshape(rows.shape)
        slot = self.lists.slot - self.start  # below 0 too where there is none
        here = (slot >= 0) & (slot < self.slots)
        at = jnp.where(here, self.lists.device * self.slots + slot, 0)
        total = jnp.zeros((len(at), rows.shape[1]), jnp.float32)
        for k in range(at.shape[1]):  # gathered, not scattered: the same order of sums on every backend
            part = parts.at[at[:, k]].get(mode="promise_in_bounds").astype(jnp.float32)
            total += jnp.where(here[:, k, None], part, 0)
        return total


def exchanged(
    experts: Experts, group: Group, move: Move, chunk_slots: int, num_waves: int = 1
) -> Callable[..., Float32[Array, "t D"]]:
    """The experts of a group for the tokens of a group, inside a shard_map over all axes of the mesh.

    Args:
        experts: the operation on one device.
        group: the devices.
        move: `dense` or `ragged`.
        chunk_slots: c, 1 .. t; with t there is one chunk and no loop. A loop keeps one more set of float32
            gradients of the device's experts in the backward pass.
        num_waves: a device's experts in as many groups, one after the other, each with exchanges of its own
            that do not depend on those of others. Only forward: gradients of weights are made once.

    Returns:
        A function of x [t, D], gate_up and down of this device, ids i32[n, t, Ke] and weights f32[n, t, Ke]
        of the whole group (-1: no expert), and repeat. It has gradients of x, gate_up, down and weights; what
        the latter have is this part of theirs, to be summed over the group.
    """

    def chunk_of(lists, tokens, number):
        slots = min(chunk_slots, tokens)
        return Chunk(lists, group, move, jnp.asarray(number * slots, jnp.int32), slots)

    def lists_for(ids, wave):
        return lists_of(ids, group, wave, round_up(ids.shape[1], min(chunk_slots, ids.shape[1])))

    def choices(chunk, wave, ids, weights):
        """ids and weights of the rows of a chunk, and which rows there are."""
        rows, total = chunk.rows, ids.shape[0] * ids.shape[1]
        chosen = ids.reshape(total, -1).at[rows].get(mode="fill", fill_value=-1) - group.number() * group.own
        chosen = jnp.where(wave.has(chosen), chosen, -1)
        return chosen, weights.reshape(total, -1).at[rows].get(mode="fill", fill_value=0), rows < total

    def num_chunks(all_lists: Lists, tokens):
        fullest = lax.pmax(all_lists.sent.max(), group.all_axes)
        return quotient(fullest + (chunk_slots - 1), chunk_slots)

    def forward(x, gate_up, down, ids, weights, repeat):
        tokens, count = x.shape[0], group.own // num_waves

        def part(lists, wave, number):
            chunk = chunk_of(lists, tokens, number)
            chosen, factors, used = choices(chunk, wave, ids, weights)
            y = experts(chunk.there(x), gate_up, down, chosen, factors, valid=used, repeat=repeat)
            return chunk.back(y)

        waves = [Wave(number * count, count) for number in range(num_waves)]
        lists = [lists_for(ids, wave) for wave in waves]
        # The first chunks of all waves stand outside the loop, so that they may overlap.
        y = functools.reduce(jnp.add, [part(own, wave, 0) for own, wave in zip(lists, waves, strict=True)])
        if chunk_slots >= tokens:
            return y
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lists)

        def more(step, y):
            number = lax.rem(step, jnp.int32(num_waves))
            own = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), stacked)
            return y + part(own, Wave(number * count, count), 1 + quotient(step, num_waves))

        steps = (num_chunks(stacked, tokens) - 1) * num_waves
        return lax.fori_loop(jnp.int32(0), steps, more, y)

    def backward(saved, dy):
        x, gate_up, down, ids, weights, repeat = saved
        tokens, wave = x.shape[0], Wave(0, group.own)
        lists = lists_for(ids, wave)
        plain = {
            name: matrices
            for name, matrices in (("gate_up", gate_up), ("down", down))
            if format_of(matrices) == "plain"
        }

        def part(number):
            chunk = chunk_of(lists, tokens, number)
            chosen, factors, used = choices(chunk, wave, ids, weights)

            def call(rows, factors, plain):
                own = {"gate_up": gate_up, "down": down} | plain
                return experts(rows, own["gate_up"], own["down"], chosen, factors, valid=used, repeat=repeat)

            _, pull = jax.vjp(call, chunk.there(x), factors, plain)
            d_rows, d_factors, d_plain = pull(jnp.where(used[:, None], chunk.there(dy), 0))
            d_weights = jnp.zeros((ids.shape[0] * tokens, ids.shape[2]), jnp.float32)
            d_weights = d_weights.at[chunk.rows].set(d_factors.astype(jnp.float32), mode="drop")
            return chunk.back(d_rows), d_weights, d_plain

        sums = part(0)
        if chunk_slots < tokens:
            wide = functools.partial(jax.tree.map, lambda a: a.astype(jnp.float32))
            sums = lax.fori_loop(
                jnp.int32(1),
                num_chunks(lists, tokens),
                lambda number, sums: jax.tree.map(jnp.add, sums, wide(part(number))),
                wide(sums),
            )
        dx, d_weights, d_plain = sums
        d_plain = jax.tree.map(lambda d, own: d.astype(own.dtype), d_plain, plain)
        d_weights = d_weights.reshape(weights.shape).astype(weights.dtype)
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


def scattered(y: Float32[Array, "n*t D"], axes: tuple[str, ...]) -> Float32[Array, "t D"]:
    """The sums over the devices along some axes of the own tokens: what undoes `gathered`."""
    return lax.psum_scatter(y, axes, scatter_dimension=0, tiled=True) if axes else y
