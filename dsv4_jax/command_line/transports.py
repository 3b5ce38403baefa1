"""What `dsv4 doctor --mesh` says of the ways in which tokens can reach their experts."""

import dataclasses
import math
from collections.abc import Sequence

from dsv4_jax.command_line.doctor import Diagnosis
from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inspection.costs import PRESETS
from dsv4_jax.inspection.spread import described_placement
from pallas_kernels.arithmetic import cdiv
from sharding.dispatch_cost import LINKS, DispatchCost, cheapest, dispatch_costs, link_of
from sharding.placement import Axis, cuts_of, ways
from sharding.rules import DECODE

NUMBER_BYTES = 2
"""Of a token's number, bfloat16."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The transports of one layer's tokens, forward.

    Attributes:
        tokens: over the whole mesh.
        devices: that share the experts.
        link: name of what connects them, in `sharding.dispatch_cost.LINKS`.
        costs: of every transport.
    """

    tokens: int
    devices: int
    link: str
    costs: tuple[DispatchCost, ...]

    @property
    def chosen(self) -> DispatchCost:
        """What a program for so many tokens does."""
        return cheapest(self.costs)

    def as_plain(self) -> dict[str, object]:
        """JSON-ready values; JSON has no infinity."""
        rows = [dataclasses.asdict(cost) for cost in self.costs]
        for row in rows:
            row["seconds"] = row["seconds"] if math.isfinite(row["seconds"]) else None
        named = {"tokens": self.tokens, "devices": self.devices, "link": self.link}
        return named | {"chosen": self.chosen.transport, "costs": rows}

    def line(self) -> str:
        """For people."""
        return "; ".join(_said(cost) + (" (chosen)" if cost == self.chosen else "") for cost in self.costs)


def _said(cost: DispatchCost) -> str:
    if not math.isfinite(cost.seconds):
        return f"{cost.transport}: not on this backend"
    rows = ", shared rows" if cost.shared and cost.transport != "gather" else ""
    return f"{cost.transport}{rows}: {cost.sent_bytes / 2**20:.2f} MiB sent, {cost.seconds * 1e6:.0f} us"


def transports(config: ModelConfig, mesh: str, link: str, tokens: Sequence[int]) -> list[Choice]:
    """What each transport costs a layer on a mesh, by the formulas of `sharding.dispatch_cost`; nothing is
    measured, and nobody needs to have the mesh.

    Args:
        config: of the model.
        mesh: a spelling, "expert=8,tensor=2".
        link: between its devices, a name in `LINKS`.
        tokens: of a step over the whole mesh, several numbers of them.

    Raises:
        ProblemsError: for a mesh that cannot be, or that the experts cannot be split over.
    """
    placement = described_placement(mesh, DECODE)
    axes = [Axis(("E",), (config.n_routed_experts,)), Axis(("F",), (config.moe_intermediate_size,))]
    cuts, problems = cuts_of("experts", axes, placement.mesh, placement.table.parameters)
    if problems:
        raise ProblemsError(f"no mesh {mesh!r} for this model", problems)
    (experts,), (width,) = cuts
    shape = {
        "hidden": config.hidden_size,
        "top_k": config.num_experts_per_tok,
        "number_bytes": NUMBER_BYTES,
        "devices": ways(placement.mesh, experts),
        "link": LINKS[link],
    }
    share = ways(placement.mesh, width)  # of tokens that a device takes for those that split its width
    return [
        Choice(
            each,
            shape["devices"],
            link,
            dispatch_costs(tokens=cdiv(each, placement.mesh.size) * share, **shape),
        )
        for each in tokens
    ]


def asked(diagnosis: Diagnosis, mesh: str, model: str, tokens: Sequence[int], link: str) -> Diagnosis:
    """The same diagnosis with the costs of transports, for a link that "here" may stand for.

    Raises:
        ProblemsError: for a mesh that cannot be, and numbers of tokens below 1.
    """
    if wrong := [f"--tokens {each}: must be at least 1" for each in tokens if each < 1]:
        raise ProblemsError("cannot count the costs of transports", wrong)
    here = diagnosis.devices[0]
    name = link_of(here.platform, here.kind) if link == "here" else link
    found = transports(PRESETS[model](), mesh, name, tokens)
    return dataclasses.replace(diagnosis, transports=tuple(found))
