"""Muon: momentum, orthogonalised matrix by matrix, as an update of fixed size.

Report, Algorithm 1 and sections 2.4 and 4.2.2. For every logically independent matrix of n x m

    M = mu M + G                                 no factor (1 - mu), no bias correction
    O = HybridNewtonSchulz(mu M + G) gamma sqrt(max(n, m))
    W = W (1 - rate decay) - rate O

The factor gives an update whose elements have root mean square gamma, so that rates tuned for AdamW serve.
`muon` is for any pytree of arrays; `Muon` are the settings of a V4 model's training, whose groups and
matrices come from the table of parameters: AdamW for embedding, head, norms and the static parts of mHC, Muon
for all other matrices. Attention sinks and the compressor's positional biases, which the report does not
name, are AdamW's.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from dsv4_jax.errors import ProblemsError
from dsv4_jax.parameter_shardings import placed_axes
from dsv4_jax.parameters import DECAYED, Parameter, Role, parameter_at
from dsv4_jax.training.optimizer import Params, role_of
from dsv4_jax.training.orthogonal_momentum import KeyPath, Layout, Matrices, Reading, scale_by_muon
from sharding.activations import Placement
from sharding.placement import sharding_of

MUON_ROLES: frozenset[Role] = frozenset({"matrix", "expert", "mixing"})
"""What Muon treats; AdamW treats the rest of what has gradients."""


def trailing_matrices(path: KeyPath, leaf: Any) -> Matrices | None:
    """Arrays of two axes or more are matrices over the last two; the others go to AdamW."""
    return Matrices(len(leaf.shape) - 2) if len(leaf.shape) >= 2 else None


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    update_rms: float = 0.18,
    *,
    matrices: Reading = trailing_matrices,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    layout: Layout | None = None,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-20,
) -> optax.GradientTransformation:
    """The report's Muon for any pytree of float arrays, with its AdamW for what is no matrix.

    Updates are to be added (`optax.apply_updates`). Weight decay is decoupled and multiplied by the rate, and
    needs `params` in `update`. A zero gradient without momentum gives no update but the decay.

    Args:
        learning_rate: a number, or a schedule of Optax: step -> number.
        momentum: mu.
        weight_decay: of every leaf, AdamW's too; 0: none.
        update_rms: gamma, the root mean square of the elements of an update before the rate.
        matrices: which leaves are matrices, and how they are read. Embedding, head and other two-dimensional
            arrays that should go to AdamW are the caller's to name: only he knows them.
        compute_dtype: of the products in Newton-Schulz: float32, or bfloat16 on accelerators.
        layout: where leaves lie on a mesh, if they do: see `scale_by_muon`.
        beta1: of AdamW, as beta2 and epsilon.
        beta2: likewise.
        epsilon: likewise.

    Raises:
        ProblemsError: for numbers out of range, all of them at once.
    """
    check_numbers(momentum, weight_decay, update_rms, compute_dtype)

    def group(path: KeyPath, leaf: Any) -> str:
        return "adamw" if matrices(path, leaf) is None else "muon"

    return optax.chain(
        optax.partition(
            {
                "muon": scale_by_muon(momentum, update_rms, matrices, compute_dtype, layout),
                "adamw": optax.scale_by_adam(beta1, beta2, epsilon),
            },
            lambda tree: jax.tree_util.tree_map_with_path(group, tree),
        ),
        optax.add_decayed_weights(weight_decay)
        if _is_traced(weight_decay) or weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def check_numbers(
    momentum: float, weight_decay: float, update_rms: float, compute_dtype: jax.typing.DTypeLike
) -> None:
    """Refuses settings of Muon that cannot be meant. Traced ones (`optax.inject_hyperparams`) are taken.

    Raises:
        ProblemsError: with all of them.
    """
    problems = []
    if not (_is_traced(momentum) or 0 <= momentum < 1):
        problems.append(f"momentum={momentum} must be at least 0 and below 1")
    if not (_is_traced(weight_decay) or (math.isfinite(weight_decay) and weight_decay >= 0)):
        problems.append(f"weight_decay={weight_decay} must be a number of at least 0")
    if not (_is_traced(update_rms) or (math.isfinite(update_rms) and update_rms > 0)):
        problems.append(f"update_rms={update_rms} must be a positive number")
    if jnp.dtype(compute_dtype).name not in ("float32", "bfloat16"):
        problems.append(f"compute_dtype={jnp.dtype(compute_dtype).name} must be float32 or bfloat16")
    if problems:
        raise ProblemsError("no such Muon", problems)


def _is_traced(number: float | jax.Array) -> bool:
    return isinstance(number, jax.core.Tracer)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon for matrices and AdamW for the rest, with the report's numbers (section 4.2.2).

    The report is silent about arrays that hold several matrices of its equations: they are parted, unless a
    switch says otherwise. It is silent about clipping too; the clip is the usual 1.

    Attributes:
        momentum: mu.
        weight_decay: of matrices, embedding and head.
        update_rms: gamma, the root mean square of an update's elements before the rate.
        beta1: of AdamW.
        beta2: of AdamW.
        epsilon: of AdamW.
        max_grad_norm: of all gradients together; None: no clip.
        compute_dtype: of the products of Newton-Schulz: float32, or bfloat16 on accelerators.
        by_branch: the branches of CSA's compressors are matrices of their own, not one.
        by_group: the groups of wo_a likewise.
        by_map: the rows of an mHC matrix that make pre, post and comb likewise.
        decay_norms: weight decay for RMSNorm weights too.
    """

    momentum: float = 0.95
    weight_decay: float = 0.1
    update_rms: float = 0.18
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-20
    max_grad_norm: float | None = 1.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    by_branch: bool = True
    by_group: bool = True
    by_map: bool = True
    decay_norms: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers out of range (ProblemsError)."""
        check_numbers(self.momentum, self.weight_decay, self.update_rms, self.compute_dtype)

    def transform(self, placement: Placement | None = None) -> optax.GradientTransformation:
        """Clipping by global norm, Muon or Adam, decoupled decay; the learning rate is not in it.

        Args:
            placement: of the parameters on a mesh; each device then orthogonalises some matrices, see
                `muon.scale_by_muon`.
        """
        clip = (
            optax.identity() if self.max_grad_norm is None else optax.clip_by_global_norm(self.max_grad_norm)
        )
        reading = functools.partial(_reading, self)
        layout = None if placement is None else functools.partial(_layout, placement)
        return optax.chain(
            clip,
            optax.partition(
                {
                    "Muon": scale_by_muon(
                        self.momentum, self.update_rms, reading, jnp.dtype(self.compute_dtype), layout
                    ),
                    "AdamW": optax.scale_by_adam(self.beta1, self.beta2, self.epsilon),
                },
                _groups,
            ),
            optax.add_decayed_weights(self.weight_decay, self._decay_mask),
        )

    def decayed(self, role: Role) -> bool:
        """Whether weight decay shrinks parameters of this role."""
        return role in DECAYED or (self.decay_norms and role == "norm")

    def _decay_mask(self, params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: self.decayed(role_of(path)), params)


def matrices_of(parameter: Parameter, settings: Muon) -> Matrices:
    """How a parameter of `MUON_ROLES` is read as matrices: its stored tensors, parted where they are several.

    Args:
        parameter: of the table.
        settings: the switches.
    """
    leading, rows = parameter.num_leading, parameter.folds[0]
    first = parameter.dims[leading]
    switches = {"w": settings.by_branch, "G": settings.by_group, "M": settings.by_map}
    if not (parameter.row.parted and switches[first]):
        return Matrices(leading, rows)
    if first == "M":
        streams = parameter.own[1]
        return Matrices(leading, rows, (streams, streams, streams * streams))
    return Matrices(leading + 1, rows - 1)


def _reading(settings: Muon, path: KeyPath, leaf: jax.Array) -> Matrices:
    return matrices_of(_parameter(path, leaf), settings)


def _layout(placement: Placement, path: KeyPath, leaf: jax.Array) -> NamedSharding:
    parameter = _parameter(path, leaf)
    name = "/".join(map(str, parameter.path))
    rules = placement.table.parameters
    sharding, problems = sharding_of(name, placed_axes(parameter, None), placement.mesh, rules)
    if problems:
        raise ProblemsError(f"cannot place {name}", problems)
    return sharding


def _groups(params: Params) -> Params:
    def group(path: KeyPath, _: jax.Array) -> str:
        return "Muon" if role_of(path) in MUON_ROLES else "AdamW"

    return jax.tree_util.tree_map_with_path(group, params)


def _parameter(path: KeyPath, leaf: jax.Array) -> Parameter:
    return parameter_at(tuple(key.key for key in path), leaf.shape)
