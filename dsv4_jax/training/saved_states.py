"""Saved states of a run, complete or not there at all, by Orbax.

A step's folder holds every array of the `TrainState` by name, split or not, and a JSON object with the rest:
where the data stands, what the observer has seen, and a checksum of every array. Saving copies the arrays to
the host at once and writes them while training goes on; a folder gets its name when all of it is on the disk.
Reading places the arrays wherever they are wanted, on another mesh or another number of processes.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from dsv4_jax.errors import ProblemsError
from dsv4_jax.training.step import TrainState
from sharding.agreement import collected
from sharding.host_values import fetched

UNREADABLE_PREFIX = "unreadable-"
"""Of the folder of a step that could not be read; it is moved out of the way, not deleted."""

BESIDE = "beside"
"""First part of the names of arrays that belong to no state."""

FORMAT = 1
_KEY = re.compile(r"[\[\]'.]+")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state that was read.

    Attributes:
        state: on its devices.
        about: what was saved beside it.
        beside: arrays that were, too, on the host.
        problems: of newer steps that could not be read, a sentence each.
    """

    state: TrainState
    about: dict
    beside: dict[str, np.ndarray]
    problems: tuple[str, ...]


class SavedStates:
    """The saved states in one folder, which belong to one run.

    With several processes all hosts must share the folder, and every process makes the same calls.

    Args:
        folder: made if it is not there.
        keep: how many steps are kept; older ones are deleted when a newer one is complete.

    Raises:
        ProblemsError: for a folder that cannot be written.
    """

    def __init__(self, folder: pathlib.Path, keep: int) -> None:
        self.folder = folder.absolute()
        self._keep = keep
        self._writing = ""  # the step that is being written, or was last
        self._manager = self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # Otherwise a folder that cannot be made is found out by waiting for it.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
            return ocp.CheckpointManager(self.folder, options=options)
        except OSError as failure:
            raise ProblemsError("cannot save states", [f"{self.folder}: {reason(failure)}"]) from failure

    def steps(self) -> list[int]:
        """Numbers of the complete steps, in order; read from the disk."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        about: Mapping[str, Any],
        beside: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Starts to save a state; its arrays may be donated when this returns.

        Args:
            state: after its step.
            about: a JSON object.
            beside: arrays of the host, the same in every process, of shapes that no state foretells.

        Raises:
            ProblemsError: this save, or the one before, which ran until now, could not be written.
        """
        step = int(fetched(state.step))
        self._writing = f"/{step}"
        arrays = {**named(state), **{f"{BESIDE}/{name}": each for name, each in beside.items()}}
        sums = {name: int(each) for name, each in fetched(checksums(arrays)).items()}
        shapes = {name: [list(each.shape), each.dtype.name] for name, each in beside.items()}
        record = {"format": FORMAT, "step": step, "checksums": sums, BESIDE: shapes, **about}
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as failure:  # of Orbax, TensorStore or the file system
            self._give_up()
            raise ProblemsError(
                "cannot save the state", [f"{self.folder}/{step}: {reason(failure)}"]
            ) from failure

    def wait(self) -> None:
        """Returns when what was saved is on the disk.

        Raises:
            ProblemsError: if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as failure:
            self._give_up()
            problem = f"{self.folder}{self._writing}: {reason(failure)}"
            raise ProblemsError("cannot save the state", [problem]) from failure

    def _give_up(self) -> None:
        """After a failure: what was half written is forgotten, so that the next save starts anew."""
        self.close()
        if jax.process_count() == 1:
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        self._manager = self._opened()

    def restore(
        self, like: TrainState, accept: Callable[[dict], None] = lambda about: None
    ) -> Restored | None:
        """The newest state that can be read in full; None if there is none at all.

        A step that cannot be read, or whose arrays are not what was saved, is named, and its folder moved
        away; the one before is taken.

        Args:
            like: shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct` or arrays).
            accept: raises for what was saved beside a state that belongs to another run; that is no damage,
                and ends the search.

        Raises:
            ProblemsError: there are saved steps, and none of them can be read.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            try:
                about = dict(self._manager.restore(step, args=_about_only()).about)
            except Exception as failure:
                problems.append(f"{self.folder}/{step}: {reason(failure)}")
                about = None
            if self._agreed(about is not None):
                accept(about)
                found = self._read(step, like, about, problems)
                if self._agreed(found is not None):
                    return Restored(found[0], about, found[1], tuple(problems))
            self._move_away(step)
        if problems:
            raise ProblemsError("no saved state can be read", problems)
        return None

    def _read(
        self, step: int, like: TrainState, about: dict, problems: list[str]
    ) -> tuple[TrainState, dict[str, np.ndarray]] | None:
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, named(like))
        shapes = about.get(BESIDE, {})
        beside = {name: f"{BESIDE}/{name}" for name in shapes}
        wanted |= {beside[name]: np.empty(*shape_and_dtype) for name, shape_and_dtype in shapes.items()}
        saved = set(about.get("checksums", ()))
        if about.get("format") != FORMAT:
            problems.append(f"{self.folder}/{step}: format {about.get('format')!r}, not {FORMAT}")
            return None
        if saved != set(wanted):
            odd = ", ".join(sorted(saved ^ set(wanted))[:3])
            raise ProblemsError(
                "the saved state belongs to another model or optimizer",
                [f"{self.folder}/{step}: arrays that only one of them has: {odd}"],
            )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            arrays = self._manager.restore(step, args=args).state
        except Exception as failure:
            problems.append(f"{self.folder}/{step}: {reason(failure)}")
            return None
        sums = fetched(checksums(arrays))
        wrong = sorted(name for name, each in sums.items() if int(each) != about["checksums"][name])
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            problems.append(f"{self.folder}/{step}: {wrong[0]}{more} is not what was saved (checksum)")
            return None
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names(like)])
        return state, {name: np.asarray(arrays[place]) for name, place in beside.items()}

    def _move_away(self, step: int) -> None:
        """A step that cannot be read must not count as one that is kept, and its number will come again."""
        if jax.process_index() == 0:
            place = self.folder / str(step)
            aside = self.folder / f"{UNREADABLE_PREFIX}{step}"
            shutil.rmtree(aside, ignore_errors=True)
            if place.exists():
                place.rename(aside)
        collected([])  # nobody reads the list of steps before that
        self._manager.reload()

    @staticmethod
    def _agreed(fine: bool) -> bool:
        """Whether all processes say so."""
        return all(said == ["yes"] for said in collected(["yes" if fine else "no"]))

    def close(self) -> None:
        """Waits for what is being written; a failure of that was told before, or is not the last word."""
        with contextlib.suppress(Exception):  # of Orbax, TensorStore or the file system
            self._manager.close()


def _about_only() -> ocp.args.Composite:
    return ocp.args.Composite(about=ocp.args.JsonRestore())


def names(tree: Any) -> list[str]:
    """Of every array of a tree, in the order of its leaves: "trained/embed", "moments/1/mu/norm"."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [_KEY.sub("/", path).strip("/") for path in paths]


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name."""
    return dict(zip(names(tree), jax.tree.leaves(tree), strict=True))


@jax.jit
def checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """A number for each array that depends on every bit of it and on where it is, wherever the array lies.

    The bits of each element, times an odd number that depends on its place, summed modulo 2^32: integer sums
    have no order, so that it is the same on every mesh. Changing one element always changes it.
    """
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.bool_):
        array = array.astype(jnp.uint8)
    width = array.dtype.itemsize * 8
    if width < 32 or array.dtype == jnp.uint32:
        unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[width]
    else:
        unsigned = jnp.uint32
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    total = jnp.zeros((), jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    odd = place * jnp.uint32(2654435761) * jnp.uint32(2) + jnp.uint32(1)
    return total + jnp.sum(words * odd, dtype=jnp.uint32)


def reason(failure: BaseException) -> str:
    """What a library says, on one line; of a long text both ends, for TensorStore tells the cause last."""
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    text = " ".join(str(failure).split()) or type(failure).__name__
    return text if len(text) <= 300 else f"{text[:110]} ... {text[-185:]}"


def as_plain(value: Any) -> Any:
    """A value of a configuration as JSON can hold it, for comparing a run with the one that was saved."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [as_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, dict):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, (bool, int, float, str)) or value is None:
        return json.loads(json.dumps(value))
    if isinstance(value, np.dtype):
        return value.name
    return str(value)
