"""How much the residual mixings of mHC amplify what goes through them, alone and one after the other.

Streams are mixed as s'_j = sum_i comb_ij s_i. A signal can grow by at most max_j sum_i |comb_ij| on its way
forward, and a gradient by max_i sum_j |comb_ij| on its way back; both are 1 for a doubly stochastic matrix,
and so are those of a product of such matrices (mHC, arXiv 2512.24880; V4 report, section 2.2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Gains(NamedTuple):
    """Means over tokens, float64[sublayers] each, in the order of the forward pass."""

    forward: np.ndarray  # of each sublayer alone
    backward: np.ndarray
    forward_through: np.ndarray  # of all sublayers up to this one
    backward_through: np.ndarray  # of this one and all after it, as a gradient meets them


def gains(mixings: Sequence[np.ndarray]) -> Gains:
    """Of the mixings of all sublayers, f32[N, N, B, T] each, input stream first."""
    matrices = [np.moveaxis(np.asarray(each, np.float64), (0, 1), (-2, -1)) for each in mixings]
    if not matrices:
        return Gains(*(np.zeros(0),) * 4)
    through = [matrices[0]]
    for matrix in matrices[1:]:
        through.append(through[-1] @ matrix)
    back = [matrices[-1]]
    for matrix in matrices[-2::-1]:
        back.append(matrix @ back[-1])
    return Gains(
        _means(matrices, axis=-2), _means(matrices, axis=-1), _means(through, axis=-2), _means(back[::-1], -1)
    )


def _means(matrices: Sequence[np.ndarray], axis: int) -> np.ndarray:
    return np.array([np.abs(matrix).sum(axis=axis).max(axis=-1).mean() for matrix in matrices])
