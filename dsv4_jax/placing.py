"""What the arguments `mesh` and `rules` of the public doors mean."""

from collections.abc import Mapping

from jax.sharding import Mesh

from dsv4_jax.errors import ProblemsError
from sharding.activations import Placement
from sharding.mesh import MeshError, mesh_of
from sharding.rules import DECODE, TABLES, Rules, RuleTable

MeshLike = str | Mapping[str, int] | Mesh
"""As "expert=8,tensor=2", {"expert": 8, "tensor": 2}, or a `jax.sharding.Mesh` with axes of these names."""

RulesLike = str | RuleTable | Rules
"""The name of a table of `sharding.rules`, a table, or rules for parameters alone."""


def placement_of(
    mesh: MeshLike | None, rules: RulesLike | None, default: RuleTable = DECODE
) -> Placement | None:
    """The placement that a mesh and rules mean; None without a mesh: everything is on the default device.

    Args:
        mesh: see `MeshLike`; axes that it does not name have size 1.
        rules: see `RulesLike`; None takes `default`. Rules for parameters leave activations as `default` has
            them.
        default: table of the use at hand.

    Raises:
        ProblemsError: rules without a mesh, an unknown table, or a mesh that cannot be; all problems at once.
    """
    problems: list[str] = []
    table = default
    if isinstance(rules, str):
        if rules not in TABLES:
            problems.append(f"there are no rules {rules!r}, only {', '.join(TABLES)}")
        table = TABLES.get(rules, default)
    elif isinstance(rules, RuleTable):
        table = rules
    elif rules is not None:
        table = RuleTable("given", dict(rules), default.activations)
    if mesh is None:
        if rules is not None:
            problems.append("rules are given, but no mesh")
        if problems:
            raise ProblemsError("cannot place the model", problems)
        return None
    try:
        built = mesh_of(mesh)
    except MeshError as refused:
        raise ProblemsError(refused.what, [*problems, *refused.problems]) from refused
    if problems:
        raise ProblemsError("cannot place the model", problems)
    return Placement(built, table)
