"""Copies of hot experts, so that no device waits long for the one that has most tokens (serving).

A device holds s slots, each with the weights of one expert: n s slots for E experts, n s >= E. The spare ones
go to the experts with most tokens. From then on a model has n s experts for all that `expert_parallel` knows;
only the ids that the router chose become numbers of slots; an expert's tokens are dealt out over its copies.

    copies   one each; then, one at a time, to the expert with the largest load a copy
    devices  copies in order of load, each to the device with the smallest sum of those with a free slot,
             first of those without a copy of that expert

Loads are what was measured: tokens of every expert, of one layer, over any time. Each layer has a table of
its own. The tables are small and made on the host; nothing here is for training, whose copies would have to
add up their gradients.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


@dataclasses.dataclass(frozen=True)
class Copies:
    """Which slot holds which expert, of one layer.

    Attributes:
        expert_of: i32[n s] the expert of every slot, device by device.
        slots_of: i32[E, C] the slots of every expert; its last one again behind `count`.
        count: i32[E] copies of every expert, 1 .. C.
    """

    expert_of: np.ndarray
    slots_of: np.ndarray
    count: np.ndarray

    def laid_out(self, weights: Any, axis: int = 0) -> Any:
        """Weights with an axis of E experts, arrays or trees of them, as weights of all slots."""
        return jax.tree.map(lambda a: jnp.take(a, self.expert_of, axis=axis), weights)

    def slots(self, ids: Int32[Array, "T Ke"]) -> Int32[Array, "T Ke"]:
        """The slot that serves each pair: token t takes copy number t modulo the expert's copies.

        Ids that are no expert's stay what they are below 0, and become the number of slots above E - 1.
        """
        token = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
        return _dealt(ids, token, self.slots_of, self.count, len(self.expert_of))

    def slots_in(self, most: int) -> Int32[np.ndarray, "E most"]:
        """`slots_of` with more columns, the last one again."""
        return self.slots_of[:, np.minimum(np.arange(most), self.slots_of.shape[1] - 1)]

    def device_loads(self, loads: Float[np.ndarray, " E"], devices: int) -> np.ndarray:
        """[n] what each device has to do if an expert's tokens are dealt out evenly."""
        share = np.asarray(loads, float) / self.count
        return share[self.expert_of].reshape(devices, -1).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class LayerCopies:
    """The tables of all layers of a model, by where their experts' parameters are; hashable, a part of what
    compiled programs are keyed by.

    Attributes:
        tables: (path of the feed-forward sublayer, tables of its repeats); equal numbers of slots in all.
    """

    tables: tuple[tuple[tuple[str | int, ...], tuple[Copies, ...]], ...]

    def __hash__(self) -> int:
        """Equal tables are one key."""
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        """Whether every expert has the same slots."""
        return isinstance(other, LayerCopies) and self._key == other._key

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return tuple((path, tuple(each.expert_of.tobytes() for each in own)) for path, own in self.tables)

    def slots(
        self, path: tuple[str | int, ...], repeat: Int32[Array, ""], ids: Int32[Array, "*tokens Ke"]
    ) -> Int32[Array, "*tokens Ke"]:
        """`Copies.slots` of one layer; the ids themselves where the layer has no table.

        Args:
            path: of its feed-forward sublayer.
            repeat: which one of its stack.
            ids: of experts, any number of dims of tokens.
        """
        own = dict(self.tables).get(path)
        if own is None:
            return ids
        most = max(each.slots_of.shape[1] for each in own)
        wide = [each.slots_in(most) for each in own]
        slots_of, count = (np.stack(each).astype(np.int32) for each in (wide, [each.count for each in own]))
        token = jnp.arange(math.prod(ids.shape[:-1]), dtype=jnp.int32).reshape(*ids.shape[:-1], 1)
        return _dealt(
            ids, token, jnp.asarray(slots_of)[repeat], jnp.asarray(count)[repeat], len(own[0].expert_of)
        )


def _dealt(
    ids: Int32[Array, "*tokens Ke"],
    token: Int32[Array, "*tokens 1"],
    slots_of: Int32[Array, "E C"],
    count: Int32[Array, " E"],
    num_slots: int,
) -> Int32[Array, "*tokens Ke"]:
    """The slot of each pair: token t takes copy number t modulo the expert's copies. Ids below 0 stay; those
    above E - 1 become `num_slots`."""
    experts, copies = slots_of.shape
    known = jnp.clip(ids, 0, experts - 1)
    copy = jax.lax.rem(token, jnp.asarray(count, jnp.int32)[known])
    slot = jnp.asarray(slots_of, jnp.int32).reshape(-1)[known * copies + copy]
    return jnp.where(ids < 0, ids, jnp.where(ids < experts, slot, jnp.int32(num_slots)))


def place_copies(loads: Float[np.ndarray, " E"], devices: int, slots: int) -> Copies:
    """The table for these loads.

    Args:
        loads: tokens of every expert of a layer, or anything in proportion to them; not negative.
        devices: n.
        slots: s of each device.

    Raises:
        ValueError: for loads that are negative, not finite or not one number an expert, sizes below 1, and
            fewer slots than experts; all problems at once.
    """
    loads = np.asarray(loads, float)
    rules = {
        f"loads {loads.shape} must be [E], at least one": loads.ndim == 1 and loads.size > 0,
        "loads must be finite and not negative": bool(np.isfinite(loads).all() and (loads >= 0).all()),
        f"devices={devices} must be at least 1": devices >= 1,
        f"slots={slots} must be at least 1": slots >= 1,
        f"{devices} x {slots} slots are fewer than {loads.size} experts": devices * slots >= loads.size,
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError("copies of experts: " + "; ".join(broken))
    count = np.ones(loads.size, np.int32)
    for _ in range(devices * slots - loads.size):
        # A copy more than there are devices helps nobody while another expert can still have one.
        helped = np.where(count < devices, loads / count, -1.0)
        count[np.argmax(helped if (count < devices).any() else loads / count)] += 1

    share = loads / count
    copies = np.repeat(np.arange(loads.size), count)
    held: list[list[int]] = [[] for _ in range(devices)]
    sums = np.zeros(devices)
    for expert in copies[np.argsort(-share[copies], kind="stable")]:
        free = [d for d in range(devices) if len(held[d]) < slots]
        device = min(free, key=lambda d: (expert in held[d], sums[d], d))
        held[device].append(int(expert))
        sums[device] += share[expert]
    expert_of = np.asarray([sorted(own) for own in held], np.int32).reshape(-1)
    slots_of = np.zeros((loads.size, int(count.max())), np.int32)
    for expert in range(loads.size):
        own = np.flatnonzero(expert_of == expert)
        slots_of[expert] = own[np.minimum(np.arange(slots_of.shape[1]), len(own) - 1)]
    return Copies(expert_of, slots_of, count)
