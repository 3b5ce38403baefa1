"""TPU slices by the names that their compiler knows, such as v6e:4x8, and meshes over their devices."""

import dataclasses
import math
import re

from pallas_kernels.chips import CHIPS, Chip

# cloud.google.com/tpu/docs: the topologies that each generation is rented in, from the smallest.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
RENTED = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips with links between them.

    Attributes:
        kind: of chip, a name in `CHIPS`.
        topology: chips along each side, such as (4, 8).
    """

    kind: str
    topology: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Rates of one JAX device."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """How many are rented."""
        return math.prod(self.topology)

    @property
    def devices(self) -> int:
        """How many JAX sees: on tpu7x two a chip."""
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        """The name that it was parsed from."""
        return f"{self.kind}:{'x'.join(map(str, self.topology))}"


def parse_slice(text: str) -> tuple[Slice | None, list[str]]:
    """The slice of a name, or what is wrong with the name.

    Args:
        text: a kind of chip, a colon, and the chips along each side: "v6e:4x8", "v5p:4x4x4".
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not found:
        return None, [f"slice {text!r}: is spelled like v6e:4x8 or tpu7x:2x2x4"]
    kind, sides = found[1], tuple(map(int, found[2].split("x")))
    if kind not in CHIPS:
        return None, [f"slice {text!r}: there is no chip {kind!r} here, only {', '.join(CHIPS)}"]
    problems = []
    if len(sides) != CHIPS[kind].torus:
        problems.append(f"slice {text!r}: slices of {kind} have {CHIPS[kind].torus} sides, not {len(sides)}")
    if 0 in sides:
        problems.append(f"slice {text!r}: every side must be at least 1")
    return (None, problems) if problems else (Slice(kind, sides), [])


def rented_slices(kind: str, most_chips: int | None = None) -> list[Slice]:
    """Slices of a kind of chip, from the smallest.

    Args:
        kind: of chip.
        most_chips: larger ones are left out.
    """
    found = [Slice(kind, tuple(map(int, name.split("x")))) for name in RENTED[kind]]
    return [each for each in found if most_chips is None or each.chips <= most_chips]


MOST_TENSOR = 8
"""Beyond it a head group, and an expert's width, would be split into parts of a few tiles."""


def meshes(devices: int, work: str) -> list[str]:
    """Spellings of the meshes that are worth a look, those with the most expert parallelism first.

    Experts, the width of experts (tensor), and the rest: rows for inference (data), parameters for training
    (fsdp). Splits that the model's sizes forbid are among them; the sharding rules refuse those.

    Args:
        devices: that all of them use.
        work: decode, prefill or train.
    """
    rest = "fsdp" if work == "train" else "data"
    found = []
    for expert in sorted((n for n in range(1, devices + 1) if devices % n == 0), reverse=True):
        for tensor in (n for n in (1, 2, 4, 8) if n <= MOST_TENSOR and devices // expert % n == 0):
            sizes = {rest: devices // expert // tensor, "expert": expert, "tensor": tensor}
            spelled = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
            found.append(spelled or "data=1")
    return found
