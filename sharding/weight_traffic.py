"""Weights against rows: the bytes that a split weight costs a device, if its parts are gathered or stay.

A weight of W bytes with I inputs and O outputs lies in n parts on n devices, which together have T tokens of
b bytes a number. Bytes that come to each device for one product, forward:

    gather the weight    (n - 1) / n  W
    exchange rows        (n - 1) / n  T (i + o)

    i   I b                  rows that are split over the same devices are brought together
        I b / g              of g groups of heads a device gets its own alone
        0                    rows are whole there already, or come from a product that left them in parts
    o   O b / n              results go back to rows by all_to_all; O b where rows are whole: a gather
        0                    results stay in parts for the next product
        4 O                  sums over parts are added in float32; twice where rows are whole: an all-reduce

The backward pass moves each of it again, and gradients of gathered weights as well.
"""

import dataclasses
from typing import Literal

Way = Literal["weights", "rows"]
Result = Literal["back", "stays", "summed"]
"""What becomes of a product's results: see the three lines of o above."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with a split weight.

    Attributes:
        parts: n.
        weight_bytes: W, of one layer.
        inputs: numbers of a token that a part of the weight needs: I, or I / g.
        outputs: O.
        result: what becomes of the results; with "summed" the inputs lie in parts already.
        apart: whether the rows are split over the n devices too.
    """

    parts: int
    weight_bytes: float
    inputs: float
    outputs: float
    result: Result
    apart: bool

    def of_weight(self) -> float:
        """Bytes to a device if the weight is gathered."""
        return (self.parts - 1) / self.parts * self.weight_bytes

    def of_rows(self, tokens: float, number_bytes: int = 2) -> float:
        """Bytes to a device if rows are exchanged.

        Args:
            tokens: T of the n devices together.
            number_bytes: b.
        """
        into = self.inputs * number_bytes if self.apart and self.result != "summed" else 0.0
        out = {
            "back": self.outputs * number_bytes / (self.parts if self.apart else 1),
            "stays": 0.0,
            "summed": 4 * self.outputs * (1 if self.apart else 2),
        }[self.result]
        return (self.parts - 1) / self.parts * tokens * (into + out)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one split weight costs a device, both ways.

    Attributes:
        name: of the weight.
        layers: that have one like it.
        parts: n.
        axes: of the mesh that make the parts.
        weight_bytes: to a device and layer, if the weight is gathered.
        rows_bytes: likewise, if rows are exchanged.
        chosen: what is done.
    """

    name: str
    layers: int
    parts: int
    axes: tuple[str, ...]
    weight_bytes: float
    rows_bytes: float
    chosen: Way

    @property
    def cheaper(self) -> Way:
        """What moves fewer bytes."""
        return "rows" if self.rows_bytes <= self.weight_bytes else "weights"

    def remark(self, tokens: int) -> str | None:
        """A sentence where the choice is not the cheaper one; `tokens` of the whole mesh."""
        if self.chosen == self.cheaper:
            return None
        moved = {"weights": self.weight_bytes, "rows": self.rows_bytes}
        done, other = (
            ("gathered", "exchanging rows") if self.chosen == "weights" else ("kept", "gathering it")
        )
        return (
            f"{self.name} is {done}, which moves {moved[self.chosen] / 2**20:.3f} MiB a layer and device;"
            f" with {tokens} tokens {other} would move {moved[self.cheaper] / 2**20:.3f}"
        )
