"""How a module declares its parameters: the table says their shapes and dtypes (`dsv4_jax.parameters`).

A module holds zeros; `initial.initial_parameters` draws values and checkpoints bring their own. So building a
module costs nothing under `nnx.eval_shape`, which is how every model is built.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv4_jax.parameters import Parameter, Path


@dataclasses.dataclass(frozen=True)
class Declared:
    """The part of the table that lies below one module.

    Attributes:
        table: every parameter of the model.
        param_dtype: of matrices (the policy's).
        root: path of the module.
    """

    table: Mapping[Path, Parameter]
    param_dtype: np.dtype
    root: Path = ()

    def under(self, *keys: str | int) -> "Declared":
        """The part below a submodule."""
        return dataclasses.replace(self, root=(*self.root, *keys))

    def __call__(self, name: str) -> nnx.Param:
        """The module's parameter of this name, zeros until values are given.

        Raises:
            KeyError: if the table has no such parameter.
        """
        parameter = self.table[*self.root, name]
        return nnx.Param(jnp.zeros(parameter.shape, parameter.dtype(self.param_dtype)))
