"""What it costs to bring tokens to their experts and back, by transport, before anything is compiled.

n devices share the experts; each has t tokens of D numbers (b bytes each) with Ke experts; results come back
in float32. Under uniform routing a given other device is wanted by a token with probability

    p = 1 - (1 - 1/n)^Ke

so that about p t rows go from one device to another: a row travels once to a device, however many of the
token's experts live there. Bytes that a device sends over its links:

    gather       (n - 1) t (D b + 8 Ke)    +  (n - 1) t 4 D        all tokens to all, sums reduced on the way
    all_to_all   (n - 1) c D (b + 4) h     +  (n - 1) t 8 Ke       c rows to every device, full or not
    ragged       (n - 1) p t D (b + 4) h   +  (n - 1) t 8 Ke       the rows that are wanted

with c = `chunk_rows`, one chunk (balanced routing), and h the mean number of links that a row crosses: 1
behind a switch, d n^(1/d) / 4 (at least 1) on a torus of d dimensions. In a gather rows are passed on and on,
over each link once, so its h is 1. 8 Ke bytes are a token's ids and routing weights. Bytes that move in a
device's own memory:

    gather       2 n t D (b + 4)           written and read once: gathered tokens, sums before the reduction
    others       4 n c D (b + 4)           as much on the sending side as on the receiving one

    seconds = sent / link bytes a second  +  moved / memory bytes a second  +  collectives * latency

What a collective waits for the most loaded device is in none of this.
"""

import dataclasses
import math
from typing import Literal

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.chips import CHIPS

Transport = Literal["gather", "all_to_all", "ragged"]

SLACK = 1.5
"""Rows of a chunk over those that uniform routing needs. More are sent in further chunks, never dropped."""

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
        torus: dimensions of the torus; 0 behind a switch.
        ragged: whether the backend has `ragged_all_to_all`.
    """

    bytes_per_second: float
    latency_seconds: float
    memory_bytes_per_second: float
    torus: int = 0
    ragged: bool = True

    def links_crossed(self, devices: int) -> float:
        """By a row on its way to any of these devices, on average."""
        return max(1.0, self.torus * devices ** (1 / self.torus) / 4) if self.torus else 1.0


LINKS = {
    # Two links a dimension: 45 GB/s a direction on v5e, 90 on v5p and v6e, 100 on tpu7x (a device is half).
    "v5e": Link(180e9, 1e-5, CHIPS["v5e"].hbm_bytes_per_second, torus=2),
    "v5p": Link(540e9, 1e-5, CHIPS["v5p"].hbm_bytes_per_second, torus=3),
    "v6e": Link(360e9, 1e-5, CHIPS["v6e"].hbm_bytes_per_second, torus=2),
    "tpu7x": Link(300e9, 1e-5, CHIPS["tpu7x"].hbm_bytes_per_second, torus=3),
    "gpu": Link(450e9, 2e-5, 4.8e12),
    "cpu": Link(2e9, 2e-4, 8e9, ragged=False),
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
        rows: that a device holds for its experts, full or not.
        sent_bytes: over the links, each link that is crossed counted.
        moved_bytes: in its own memory.
        collectives: one after the other.
        seconds: by the formula above; infinite where the backend has no such transport.
    """

    transport: Transport
    rows: int
    sent_bytes: float
    moved_bytes: float
    collectives: int
    seconds: float


def chunk_rows(tokens: int, devices: int, top_k: int) -> int:
    """Rows c that a device sends to each other one at a time: `SLACK` p t, or all t tokens if that is close.

    Args:
        tokens: t of one device.
        devices: n.
        top_k: Ke.
    """
    wanted = SLACK * _share(devices, top_k) * tokens
    return tokens if wanted >= WHOLE_FROM * tokens else min(tokens, cdiv(math.ceil(wanted), ROWS) * ROWS)


def dispatch_costs(
    *,
    tokens: int,
    hidden: int,
    top_k: int,
    number_bytes: int,
    devices: int,
    link: Link,
    rows: int | None = None,
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
    """
    rows = chunk_rows(tokens, devices, top_k) if rows is None else rows
    others, both_ways = devices - 1, hidden * (number_bytes + 4)
    choices = others * tokens * 8 * top_k
    crossed = link.links_crossed(devices)
    counted = 1 if rows < tokens else 0  # how many chunks, agreed on by all
    exchanged = 4 * devices * rows * both_ways

    def cost(transport: Transport, held: int, sent: float, moved: float, collectives: int) -> DispatchCost:
        seconds = sent / link.bytes_per_second + moved / link.memory_bytes_per_second
        seconds += collectives * link.latency_seconds
        missing = transport == "ragged" and not link.ragged
        return DispatchCost(transport, held, sent, moved, collectives, math.inf if missing else seconds)

    all_tokens, wanted = others * tokens * both_ways, _share(devices, top_k) * tokens
    return (
        cost("gather", devices * tokens, all_tokens + choices, 2 * devices * tokens * both_ways, 3),
        cost(
            "all_to_all",
            devices * rows,
            others * rows * both_ways * crossed + choices,
            exchanged,
            3 + counted,
        ),
        cost(
            "ragged",
            devices * rows,
            others * wanted * both_ways * crossed + choices,
            exchanged,
            3 + counted,
        ),
    )


def cheapest(costs: tuple[DispatchCost, ...]) -> Transport:
    """The transport with the fewest seconds; the first of equals."""
    return min(costs, key=lambda cost: cost.seconds).transport


def _share(devices: int, top_k: int) -> float:
    """p: how likely a token wants a given device."""
    return 1 - (1 - 1 / devices) ** top_k
