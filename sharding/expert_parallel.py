"""The routed experts on a mesh: tokens go to the devices that hold their experts, and their sums come back.

Everything happens in one `shard_map` over all axes of the mesh. Tokens are split over all of them; experts
over the axes that the letter E has, their hidden width over those of F, and both matrices' D over those of D.

    D   the parts are gathered in front of everything else (with `repeat`, of that layer alone)
    F   tokens are gathered along its axes first, and the sums over the parts are scattered behind the rest
    E   tokens travel by one of three transports, none of which ever drops one:

    gather       all tokens to all devices of the group; sums are reduced on their way back. For few tokens.
    all_to_all   rows to where they are wanted, in chunks of fixed size (`transports`). On any backend.
    ragged       the same chunks, and of them only rows that are in use. TPU and GPU.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats.blocks import Blocks, format_of
from pallas_kernels.formats.sizes import ACTIVATION_GROUP, FP4_GROUP, FP8_BLOCK
from sharding.dispatch_cost import (
    LINKS,
    DispatchCost,
    cheapest,
    choose_waves,
    chunk_rows,
    cost_of,
    dispatch_costs,
    link_of,
)
from sharding.mesh import AXES
from sharding.rules import OPTIONAL
from sharding.sums import scattered
from sharding.transports import Experts, Group, Plan, dense, exchanged, gathered, ragged

TOKEN_AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Tokens are split over all axes, in this order: what is whole along `tensor` is then cut, and not moved."""

Matrices = Float[Array, "*R E O I"] | Blocks
Transport = Literal["auto", "gather", "all_to_all", "ragged"]


def over_mesh(
    experts: Experts,
    mesh: Mesh | AbstractMesh,
    *,
    transport: Transport = "auto",
    waves: int | None = None,
    chunk: int | None = None,
    shared: bool | None = None,
    narrow: bool = False,
    weight_axes: Mapping[str, str | tuple[str, ...]],
) -> "ExpertParallel":
    """The operation `experts` with its tokens and weights split over a mesh.

    Args:
        experts: the operation on one device, `grouped_matmul.expert_ffn` or what behaves like it: pairs whose
            id is out of range contribute nothing and cost nothing, and `expected_pairs` are the likely ones.
        mesh: with the axes `AXES`.
        transport: how tokens reach their experts; "auto" takes the one with the lowest cost for the number of
            tokens (`dispatch_cost`), when a program is traced.
        waves: groups of a device's experts, whose exchanges and products may overlap, forward; None takes
            `dispatch_cost.choose_waves`. A gather has one. On TPUs more than one pays only in programs that
            are compiled with the options `dispatch_cost.ASYNCHRONOUS`.
        chunk: rows c that a device sends to another one at a time (`transports`); None means
            `dispatch_cost.chunk_rows`. Speed and memory only.
        shared: whether a token's experts on one device share a row (`transports`); None takes what costs
            less.
        narrow: whether the sums of `all_to_all` and `ragged` come back in the dtype of the tokens, each
            rounded once, as the report counts their bytes (section 3.1), and not in float32.
        weight_axes: letter E, F or D -> the axes that the parameters are split over along it, as in a table
            of `sharding.rules`. An axis goes to the first of E, F and D that asks for it and that it can cut
            into even parts of whole quantisation blocks. What is not cut is whole on every device: XLA
            gathers its parts in front of the operation.

    Returns:
        A function with the signature of `experts`, to be called inside a jit with whole arrays. Equal calls
        of this give equal functions.

    Raises:
        ValueError: for axes that the mesh does not have, unknown letters or transports, "ragged" on CPU
            devices, or waves or chunks below 1; all problems at once.
    """
    named = {
        letter: tuple(a.removesuffix(OPTIONAL) for a in ((axes,) if isinstance(axes, str) else axes))
        for letter, axes in weight_axes.items()
    }
    every = [axis for axes in named.values() for axis in axes]
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "tpu"
    rules = {
        f"the mesh has axes {mesh.axis_names}, and must have {AXES}": set(mesh.axis_names) == set(AXES),
        f"transport={transport!r} must be auto, gather, all_to_all or ragged": transport
        in ("auto", "gather", "all_to_all", "ragged"),
        f"transport='ragged' needs ragged_all_to_all, which {platform!r} has not; use 'all_to_all'": (
            transport != "ragged" or platform != "cpu"
        ),
        f"waves={waves} must be at least 1": waves is None or waves >= 1,
        f"chunk={chunk} must be at least 1": chunk is None or chunk >= 1,
        f"weight_axes {named}: only E, F and D can be split": set(named) <= set("EFD"),
        f"weight_axes {named}: the mesh has only {mesh.axis_names}": set(every) <= set(mesh.axis_names),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError("expert parallelism: " + "; ".join(broken))
    return ExpertParallel(
        experts, mesh, transport, waves, chunk, shared, narrow, tuple(sorted(named.items()))
    )


@dataclasses.dataclass(frozen=True)
class Cut:
    """Over which axes the weights of one call are split, those of size 1 left out.

    Attributes:
        experts: E of both.
        width: F of both.
        gate_up_hidden: D of gate_up, its last axis.
        down_hidden: D of down, its last but one.
    """

    experts: tuple[str, ...]
    width: tuple[str, ...]
    gate_up_hidden: tuple[str, ...]
    down_hidden: tuple[str, ...]

    def specs(self, layers: bool) -> tuple[PartitionSpec, PartitionSpec]:
        """Of gate_up and down, elements and scales alike; `layers`: with an axis R in front."""
        front = (None,) * layers
        return (
            PartitionSpec(*front, self.experts, None, self.width, self.gate_up_hidden),
            PartitionSpec(*front, self.experts, self.down_hidden, self.width),
        )


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
    """What `over_mesh` returns, which says what the fields are."""

    experts: Experts
    mesh: Mesh | AbstractMesh
    transport: Transport
    waves: int | None
    chunk: int | None
    shared: bool | None
    narrow: bool
    weight_axes: tuple[tuple[str, tuple[str, ...]], ...]

    def __call__(
        self,
        x: Float[Array, "T D"],
        gate_up: Matrices,
        down: Matrices,
        ids: Int32[Array, "T Ke"],
        weights: Float32[Array, "T Ke"],
        *,
        valid: Bool[Array, "T"] | None = None,
        repeat: Int32[Array, ""] | None = None,
        **settings: Any,
    ) -> Float32[Array, "T D"]:
        """The experts' weighted sums for every token; arguments and result as of `grouped_matmul.expert_ffn`.

        T may be any number. Gradients of x are added over devices in float32.

        Raises:
            ValueError: for shapes that do not fit, and waves that do not divide the experts of a device; what
                the operation on one device refuses.
        """
        local = functools.partial(self.experts, **settings)
        if ids.size == 0:
            return local(x, gate_up, down, ids, weights, valid=valid, repeat=repeat)
        wrong = _problems(x, gate_up, down, ids, weights, valid, repeat)
        if wrong:
            raise ValueError("expert parallelism: " + "; ".join(wrong))
        tokens, top_k = ids.shape
        rounded = settings.get("round_hidden") is not None
        travel = self.travel(gate_up, down, x, top_k, rounded=rounded)
        ids = chosen_ids(ids, valid, gate_up.shape[0 if repeat is None else 1])
        filling = -tokens % self.mesh.size
        x, weights = (jnp.pad(a, ((0, filling), (0, 0))) for a in (x, weights))
        ids = jnp.pad(ids, ((0, filling), (0, 0)), constant_values=-1)
        own = PartitionSpec(TOKEN_AXES)
        split = jax.shard_map(
            functools.partial(on_device, local, travel),
            mesh=self.mesh,
            in_specs=(own, *travel.cut.specs(repeat is not None), own, own, PartitionSpec()),
            out_specs=own,
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(x, gate_up, down, ids, weights, repeat)[:tokens]

    def cut(self, gate_up: Matrices, down: Matrices, *, rounded: bool = False) -> Cut:
        """Which letters of these weights are split, decided by sizes and formats alone.

        Args:
            gate_up: [(R,) E, 2, F, D], arrays or shapes of them.
            down: [(R,) E, D, F].
            rounded: whether hidden activations are rounded in groups, which no split of F may part.
        """
        axes, used = dict(self.weight_axes), set[str]()

        def taken(letter: str, *dims: tuple[Matrices, int, int]) -> tuple[str, ...]:
            found: tuple[str, ...] = ()
            for axis in axes.get(letter, ()):
                parts = self._parts((*found, axis))
                fits = all(
                    matrices.shape[dim] % parts == 0
                    and matrices.shape[dim] // parts % math.lcm(least, _block(matrices, dim)) == 0
                    for matrices, dim, least in dims
                )
                if fits and axis not in used and self.mesh.shape[axis] > 1:
                    found = (*found, axis)
            return found

        least = ACTIVATION_GROUP if rounded else 1
        experts = taken("E", (gate_up, -4, 1), (down, -3, 1))
        used.update(experts)
        width = taken("F", (gate_up, -2, least), (down, -1, least))
        used.update(width)
        return Cut(experts, width, taken("D", (gate_up, -1, 1)), taken("D", (down, -2, 1)))

    def costs(self, cut: Cut, x: jax.Array, top_k: int) -> tuple[DispatchCost, ...]:
        """What each transport would cost (`dispatch_cost`), for people and for "auto".

        Args:
            cut: of the weights.
            x: [T, D], whole, or its shape.
            top_k: Ke.
        """
        return dispatch_costs(**self._sizes(cut, x, top_k))

    def _sizes(self, cut: Cut, x: jax.Array, top_k: int) -> dict[str, Any]:
        """What costs depend on. A mesh of no devices counts as one of TPUs that are not known."""
        device = self.mesh.devices.flat[0] if isinstance(self.mesh, Mesh) else None
        kind = ("tpu", "") if device is None else (device.platform, device.device_kind)
        return {
            "tokens": cdiv(x.shape[0], self.mesh.size) * self._parts(cut.width),
            "hidden": x.shape[1],
            "top_k": top_k,
            "number_bytes": x.dtype.itemsize,
            "devices": self._parts(cut.experts),
            "link": LINKS[link_of(*kind)],
            "rows": self.chunk,
            "shared": self.shared,
            "sum_bytes": x.dtype.itemsize if self.narrow else 4,
        }

    def _parts(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def travel(
        self, gate_up: Matrices, down: Matrices, x: jax.Array, top_k: int, *, rounded: bool = False
    ) -> "Travel":
        """How tokens will reach their experts in a call with these arrays, or shapes of arrays.

        Args:
            gate_up: [(R,) E, 2, F, D].
            down: [(R,) E, D, F].
            x: [T, D], whole.
            top_k: Ke.
            rounded: whether hidden activations are rounded in groups.

        Raises:
            ValueError: if the waves that were asked for do not divide the experts of a device, or the pairs
                of tokens and experts are too many for int32 sort keys.
        """
        cut = self.cut(gate_up, down, rounded=rounded)
        sizes = self._sizes(cut, x, top_k)
        devices, tokens = sizes["devices"], sizes["tokens"]
        if devices == 1:
            return Travel(cut, "gather", None)
        costs = dispatch_costs(**sizes)
        chosen = cheapest(costs) if self.transport == "auto" else cost_of(self.transport, costs)
        *layers, num_experts, _, width, _ = gate_up.shape
        own, waves, parts = num_experts // devices, self.waves, self._parts(cut.width)
        if waves is None or chosen.transport == "gather":
            held = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((gate_up, down)))
            one_device = sum(held) // (math.prod(layers) * devices * parts)
            waves = choose_waves(chosen.transport, own, width // parts, one_device, **sizes)
        elif own % waves:
            raise ValueError(f"expert parallelism: waves={waves} must divide the {own} experts of a device")
        keys = (devices * waves + 1) * tokens * top_k
        if chosen.transport != "gather" and keys >= 2**31:
            raise ValueError(
                f"expert parallelism: {tokens} x {top_k} pairs of a device in {devices} x {waves} lists need"
                f" sort keys up to {keys}, more than int32 holds; split the tokens over more devices"
            )
        group = Group(cut.experts, devices, own, AXES)
        move = ragged if chosen.transport == "ragged" else dense
        rows = self.chunk
        if rows is None:
            rows = chunk_rows(tokens, devices * waves, top_k, shared=chosen.shared)
        plan = Plan(group, move, rows, waves, chosen.shared, self.narrow)
        return Travel(cut, chosen.transport, plan._replace(slots=min(rows, plan.longest(tokens, top_k))))


@dataclasses.dataclass(frozen=True)
class Travel:
    """How one call's tokens reach their experts.

    Attributes:
        cut: of the weights.
        transport: what was chosen; never "auto".
        plan: of the exchanges, also where all tokens are gathered; None where every device has all experts.
    """

    cut: Cut
    transport: Transport
    plan: Plan | None


def chosen_ids(
    ids: Int32[Array, "*tokens Ke"], valid: Bool[Array, "*tokens"] | None, num_experts: int
) -> Int32[Array, "*tokens Ke"]:
    """The ids, and -1 for those of no expert and of tokens that are not valid: padding asks for nothing."""
    chosen = (ids >= 0) & (ids < num_experts)
    return jnp.where(chosen if valid is None else chosen & valid[..., None], ids, -1)


def on_device(local, travel: Travel, x, gate_up, down, ids, weights, repeat):
    """One device's tokens [t, D], through all experts."""
    cut, plan = travel.cut, travel.plan
    gate_up, down, repeat = _whole_hidden(cut, gate_up, down, repeat)
    direct = plan is None or travel.transport == "gather"
    axes = cut.experts + cut.width if direct else cut.width
    x = gathered(x, axes)
    ids, weights = _gathered_choices(ids, weights, axes)
    if not direct:
        y = exchanged(local, plan)(x, gate_up, down, ids, weights, repeat)
    elif plan is None:
        y = local(x, gate_up, down, ids, weights, repeat=repeat)
    else:  # all tokens of the group, and few of their experts
        mine, likely = ids - plan.group.number() * plan.group.own, cdiv(ids.size, plan.group.size)
        y = local(x, gate_up, down, mine, weights, repeat=repeat, expected_pairs=likely)
    return scattered(y, axes)


def _gathered_choices(ids, weights, axes):
    """ids and weights of all tokens along some axes, in one gather; float32 holds ids below 2^24 exactly."""
    if not axes:
        return ids, weights
    packed = jnp.concatenate([weights.astype(jnp.float32), ids.astype(jnp.float32)], axis=1)
    packed = lax.all_gather(packed, axes, tiled=True)
    top_k = ids.shape[1]
    return packed[:, top_k:].astype(jnp.int32), packed[:, :top_k].astype(weights.dtype)


def _whole_hidden(cut: Cut, gate_up, down, repeat):
    """Matrices with all of D, and which layer of them to use; only that layer is gathered."""
    if not cut.gate_up_hidden and not cut.down_hidden:
        return gate_up, down, repeat

    def whole(axes, dim, array):
        if repeat is not None:
            if array.dtype == jnp.float8_e4m3fn:  # as bytes: XLA:CPU moves eight-bit floats by another type
                bytes_ = whole(axes, dim, lax.bitcast_convert_type(array, jnp.uint8))
                return lax.bitcast_convert_type(bytes_, array.dtype)
            array = lax.dynamic_index_in_dim(array, repeat, keepdims=False)
        return lax.all_gather(array, axes, axis=array.ndim + dim, tiled=True) if axes else array

    gate_up = jax.tree.map(functools.partial(whole, cut.gate_up_hidden, -1), gate_up)
    down = jax.tree.map(functools.partial(whole, cut.down_hidden, -2), down)
    return gate_up, down, None


def _block(matrices: Matrices, dim: int) -> int:
    """Numbers along an axis, counted from the end, that share a scale."""
    form = format_of(matrices)
    if form == "fp8" and dim >= -2:
        return FP8_BLOCK
    return FP4_GROUP if form == "mxfp4" and dim == -1 else 1


def _problems(x, gate_up, down, ids, weights, valid, repeat) -> list[str]:
    """What would break the split, in the words of the whole arrays; the operation checks the rest."""
    layers = 0 if repeat is None else 1
    rules = {
        f"ids {ids.shape} must be [T, Ke], and weights {weights.shape} as well": ids.ndim == 2
        and ids.shape == weights.shape,
        f"x {x.shape} must be [T, D] with T = {ids.shape[0]}": x.ndim == 2 and len(x) == ids.shape[0],
        f"gate_up {gate_up.shape} must be {'[R, E, 2, F, D]' if layers else '[E, 2, F, D]'}": len(
            gate_up.shape
        )
        == 4 + layers,
        f"down {down.shape} must be {'[R, E, D, F]' if layers else '[E, D, F]'}": len(down.shape)
        == 3 + layers,
        f"valid must be [T] with T = {ids.shape[0]}": valid is None or valid.shape == ids.shape[:1],
        f"repeat {getattr(repeat, 'shape', repeat)} must be a scalar": repeat is None
        or jnp.shape(repeat) == (),
    }
    return [rule for rule, holds in rules.items() if not holds]
