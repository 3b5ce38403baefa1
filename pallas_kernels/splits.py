"""How the arrays of an operation may be split over devices, as data: a table in each family's `op.py`."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Splits(NamedTuple):
    """The dims of an operation's arrays, and those of them that devices may share.

    Dims are letters of the legend, one word each. `*n` stands for any number of dims, once; `G*I` is one
    dim of G groups of I; `O/128` has one number for 128 of O; `W-1+T` is never split. A letter that is
    neither in `free` nor in `summed` must be whole on every device.
    """

    arguments: Mapping[str, Any]  # name -> its dims; for a tuple of arrays, such a tuple of dims
    results: tuple[Any, ...]  # dims of what it returns, one after the other; for a tuple of arrays, a tuple
    free: str  # letters that may be split, with nothing to communicate in the forward pass
    summed: str = ""  # letters that may be split, if the results are then summed over the devices
    multiples: Mapping[str, int] = {}  # letter -> a part must be a multiple of so many

    def __hash__(self) -> int:
        """Equal tables are one key of a compiled program."""
        parts = (self.arguments.items(), self.multiples.items())
        return hash((*map(frozenset, parts), self.results, self.free, self.summed))


def letters(dim: str) -> set[str]:
    """The letters by which one dim can be split."""
    return set() if "+" in dim else set(dim.lstrip("*").split("/")[0].split("*"))
