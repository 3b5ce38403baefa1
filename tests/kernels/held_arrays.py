"""The simplest `HeldRows`: numbers in an array. The model's own holder knows formats, and is tested there."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class HeldArray(NamedTuple):
    """One layer of [R, B, S, width]."""

    stack: jax.Array
    repeat: jax.Array

    @property
    def size(self):
        return self.stack.shape[2]

    def are_numbers(self, dtype):
        return self.stack.dtype == dtype

    def prefix(self, size, dtype):
        return self.stack[self.repeat, :, :size].astype(dtype)

    def chosen(self, index, size, dtype):
        return jnp.take_along_axis(self.prefix(size, dtype), index[..., None], axis=1)

    def at_positions(self, position, dtype):
        return self.chosen(position % self.size, self.size, dtype)

    def products(self, q, start, count):
        keys = jax.lax.dynamic_slice_in_dim(self.stack[self.repeat], start, count, axis=1)
        return jnp.einsum("bnd,bsd->bns", q, keys, precision="highest", preferred_element_type=jnp.float32)
