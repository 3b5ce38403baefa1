"""What it costs to bring tokens to their experts and back, by transport, before anything is compiled.

n devices share the experts; each has t tokens of D numbers (b bytes each) with Ke experts; sums come back
with s bytes a number (4, or b if they are narrow). Under uniform routing a token wants a given device with
probability

    p = 1 - (1 - 1/n)^Ke

so that q = p t rows go from one device to another if a token's experts there share one (m = Ke ids a row), or
q = t Ke / n rows of m = 1 if not. Bytes that a device sends over its links:

    gather       (n - 1) t (D (b + 4) + 8 Ke)          all tokens to all, sums reduced on the way
    all_to_all   (n - 1) c (D (b + s) + 8 m) h         c rows to every device, full or not
    ragged       (n - 1) (q D (b + s) + 8 c m) h       the rows that are wanted

with c = `chunk_rows`, one chunk (balanced routing), and h the mean number of links that a row crosses: 1
behind a switch, d n^(1/d) / 4 (at least 1) on a torus of d dimensions. In a gather rows are passed on and on,
over each link once, so its h is 1. 8 m bytes are a row's ids and routing weights. Bytes that move in a
device's own memory, each written once and read once:

    gather       2 n t D (b + 4)  +  2 n t Ke D (b + 4)     gathered tokens, sums before the reduction
    all_to_all   4 n c D (b + s)  +  2 n c m D (b + 4)      what is sent and what arrives
    ragged       6 n c D (b + s)  +  2 n c m D (b + 4)      the same, and laid out anew once

where the second term is the operation's own: its kernels have a place for every id of every row, in use or
not. Without kernels, on CPUs, it loops over those in use.

    seconds = sent / link bytes a second  +  moved / memory bytes a second  +  collectives * latency

With the experts of a device in w waves there are as many exchanges of fewer rows: n w in the place of n in p
and q, and w times all of it, so that shared rows become more. Then the layer takes as long as the longer of
exchange and products, and one wave of the shorter:

    products     max(6 t Ke D F / FLOPs a second, bytes of the device's experts / memory bytes a second)
    layer        max(exchange, products) + min(exchange, products) / w

Where collectives are synchronous nothing overlaps, and there is one wave. On TPUs they are unless a program
is compiled with `ASYNCHRONOUS`. What a collective waits for the most loaded device is in none of this.
"""

import dataclasses
import math
from typing import Any, Literal

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.chips import CHIPS

Transport = Literal["gather", "all_to_all", "ragged"]

SLACK = 1.5
"""Rows of a chunk over those that uniform routing needs. More are sent in further chunks, never dropped."""

MOST_WAVES = 4
"""Each has a copy of the operation in the program."""

ASYNCHRONOUS = {
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_enable_async_ragged_all_to_all": "true",
}
"""Compiler options (`jax.jit(..., compiler_options=...)`): TPUs then exchange rows while they multiply.
The steps of `sharding.compiling` have them."""

WHOLE_FROM = 0.75
"""A chunk this close to all of a device's tokens takes them all, and then there is nothing to loop over."""

ROWS = 8
"""Chunks are multiples of this: rows of a tile."""


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """How a kind of device is connected. Vendors' figures or assumptions: none of it was measured by us.

    Attributes:
        bytes_per_second: that a device can send over all of its links together.
        latency_seconds: of one collective.
        memory_bytes_per_second: of a device's own memory.
        flops_per_second: of products of bfloat16 numbers.
        torus: dimensions of the torus; 0 behind a switch.
        ragged: whether the backend has `ragged_all_to_all`.
        overlaps: whether it can exchange rows while it multiplies.
        places: whether kernels keep a place for every id of every row.
    """

    bytes_per_second: float
    latency_seconds: float
    memory_bytes_per_second: float
    flops_per_second: float
    torus: int = 0
    ragged: bool = True
    overlaps: bool = True
    places: bool = True

    def links_crossed(self, devices: int) -> float:
        """By a row on its way to any of these devices, on average."""
        return max(1.0, self.torus * devices ** (1 / self.torus) / 4) if self.torus else 1.0


def _tpu(name: str, bytes_per_second: float, torus: int) -> Link:
    chip = CHIPS[name]
    return Link(bytes_per_second, 1e-5, chip.hbm_bytes_per_second, chip.bf16_flops, torus)


LINKS = {
    # Two links a dimension: 45 GB/s a direction on v5e, 90 on v5p and v6e, 100 on tpu7x (a device is half).
    "v5e": _tpu("v5e", 180e9, 2),
    "v5p": _tpu("v5p", 540e9, 3),
    "v6e": _tpu("v6e", 360e9, 2),
    "tpu7x": _tpu("tpu7x", 300e9, 3),
    "gpu": Link(450e9, 2e-5, 4.8e12, 989e12),
    "cpu": Link(2e9, 2e-4, 8e9, 1e11, ragged=False, overlaps=False, places=False),
}
"""By the names of `link_of`."""

_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "7": "tpu7x"}


def link_of(platform: str, device_kind: str) -> str:
    """The name in `LINKS` for what a `jax.Device` says of itself; TPUs that are not known count as v6e."""
    if platform != "tpu":
        return "cpu" if platform == "cpu" else "gpu"
    return next((name for part, name in _KINDS.items() if part in device_kind.lower()), "v6e")


@dataclasses.dataclass(frozen=True, slots=True)
class DispatchCost:
    """Of one layer's dispatch and return on one device, forward.

    Attributes:
        transport: what it is the cost of.
        shared: whether a row serves all of a token's experts on a device.
        rows: that a device holds for its experts, full or not, of one wave.
        sent_bytes: over the links, each link that is crossed counted.
        moved_bytes: in its own memory.
        collectives: one after the other.
        seconds: by the formula above; infinite where the backend has no such transport.
    """

    transport: Transport
    shared: bool
    rows: int
    sent_bytes: float
    moved_bytes: float
    collectives: int
    seconds: float


def chunk_rows(tokens: int, devices: int, top_k: int, *, shared: bool) -> int:
    """Rows c that a device sends to each other one at a time: `SLACK` q, or the most there can be if close.

    Args:
        tokens: t of one device.
        devices: n; times the waves, if there are.
        top_k: Ke.
        shared: whether a token's experts on a device share a row.
    """
    most = tokens if shared else tokens * top_k
    rows = SLACK * _wanted(tokens, devices, top_k, shared)
    return most if rows >= WHOLE_FROM * most else min(most, cdiv(math.ceil(rows), ROWS) * ROWS)


def dispatch_costs(
    *,
    tokens: int,
    hidden: int,
    top_k: int,
    number_bytes: int,
    devices: int,
    link: Link,
    rows: int | None = None,
    shared: bool | None = None,
    sum_bytes: int = 4,
    waves: int = 1,
) -> tuple[DispatchCost, ...]:
    """The cost of every transport, in the order gather, all_to_all, ragged.

    Args:
        tokens: t of one device.
        hidden: D.
        top_k: Ke.
        number_bytes: b, of a number of the tokens.
        devices: n that share the experts.
        link: between them.
        rows: c; None means `chunk_rows`.
        shared: whether a token's experts on a device share a row; None means what costs less.
        sum_bytes: of a number of the sums that come back, unless they are reduced on the way: there always 4.
        waves: w, of the exchanges; a gather has one.
    """
    others, both_ways, in_float32 = (
        devices - 1,
        hidden * (number_bytes + sum_bytes),
        hidden * (number_bytes + 4),
    )
    crossed = link.links_crossed(devices)

    def cost(transport: Transport, shared: bool, held: int, sent: float, moved: float, steps: int):
        seconds = sent / link.bytes_per_second + moved / link.memory_bytes_per_second
        seconds += steps * link.latency_seconds
        missing = transport == "ragged" and not link.ragged
        return DispatchCost(transport, shared, held, sent, moved, steps, math.inf if missing else seconds)

    def exchange(transport: Transport, shared: bool) -> DispatchCost:
        most = tokens if shared else tokens * top_k
        chunk = chunk_rows(tokens, devices * waves, top_k, shared=shared) if rows is None else min(rows, most)
        wanted = _wanted(tokens, devices * waves, top_k, shared) if transport == "ragged" else chunk
        ids = top_k if shared else 1
        sent = others * waves * (wanted * both_ways + 8 * chunk * ids) * crossed
        moved = (6 if transport == "ragged" else 4) * both_ways + 2 * ids * link.places * in_float32
        moved *= waves * devices * chunk
        counted = chunk < most  # how many chunks, agreed on by all
        return cost(transport, shared, devices * chunk, sent, moved, 1 + 2 * waves + counted)

    def better(transport: Transport) -> DispatchCost:
        ways = (False, True) if shared is None else (shared,)
        return min((exchange(transport, way) for way in ways), key=lambda found: found.seconds)

    sent = others * tokens * (in_float32 + 8 * top_k)
    moved = (2 + 2 * top_k * link.places) * devices * tokens * in_float32
    gather = cost("gather", True, devices * tokens, sent, moved, 3)
    return gather, better("all_to_all"), better("ragged")


def choose_waves(
    transport: Transport, own: int, width: int, weight_bytes: int, *, link: Link, **shape: Any
) -> int:
    """How many waves make the layer shortest by the formula above: a divisor of `own`, at most `MOST_WAVES`.

    Args:
        transport: whose exchanges they are.
        own: experts of a device.
        width: F of a device.
        weight_bytes: of all matrices of a device's experts.
        link: between the devices.
        shape: the other arguments of `dispatch_costs`.
    """
    if transport == "gather" or not link.overlaps:
        return 1
    flops = 6 * shape["tokens"] * shape["top_k"] * shape["hidden"] * width
    products = max(flops / link.flops_per_second, weight_bytes / link.memory_bytes_per_second)

    def seconds(waves: int) -> float:
        exchange = cost_of(transport, dispatch_costs(link=link, waves=waves, **shape)).seconds
        return max(exchange, products) + min(exchange, products) / waves

    return min((w for w in range(1, min(own, MOST_WAVES) + 1) if own % w == 0), key=seconds)


def cheapest(costs: tuple[DispatchCost, ...]) -> DispatchCost:
    """That with the fewest seconds; the first of equals."""
    return min(costs, key=lambda cost: cost.seconds)


def cost_of(transport: Transport, costs: tuple[DispatchCost, ...]) -> DispatchCost:
    """That of one transport."""
    return next(cost for cost in costs if cost.transport == transport)


def _wanted(tokens: int, devices: int, top_k: int, shared: bool) -> float:
    """q: rows from one device to another under uniform routing."""
    return tokens * (1 - (1 - 1 / devices) ** top_k if shared else top_k / devices)
