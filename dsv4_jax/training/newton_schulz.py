"""The hybrid Newton-Schulz iteration of Muon: a matrix with all its singular values brought to one.

Report, Algorithm 1 and section 2.4: ten steps of an odd polynomial, eight that bring small singular values up
quickly and two that settle what lies near one. Nothing is decomposed, everything is a product of matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""(a, b, c) of each step, Y <- a Y + b (Y Y^T) Y + c (Y Y^T)^2 Y."""

ELEMENTS_AT_ONCE = 2**14
"""Of the matrices that go through the iteration together. One at a time would do for large ones; small ones
are taken together, as many as stay in the caches of a core and bound the memory of the intermediates."""


def orthogonalized(
    matrices: Float[Array, "*stack O I"], compute_dtype: jax.typing.DTypeLike = jnp.float32
) -> Float32[Array, "*stack O I"]:
    """U V^T of each matrix U S V^T, to about a thousandth; zero matrices stay zero, and so do directions
    whose singular value is zero.

    The Gram matrix is that of the shorter side. A matrix is first divided by its largest element and then by
    its Frobenius norm, so that neither tiny nor huge gradients leave the range of float32.

    **Equation** Y = A / ||A||_F, then for each (a, b, c): Y <- a Y + (b G + c G G) Y, G = Y Y^T.

    **Args** matrices: any number of axes in front; compute_dtype: of the products' operands. Norms and sums
    are float32.
    """
    *stack, rows, columns = matrices.shape
    flat = matrices.reshape(-1, rows, columns)
    if flat.size == 0:
        return jnp.zeros(matrices.shape, jnp.float32)
    flat = _in_chunks(flat, jnp.dtype(compute_dtype))
    return flat.reshape(*stack, rows, columns)


def _in_chunks(matrices: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
    """`_iterated` of [K, O, I] in equal parts, the last of which zero matrices fill up."""
    count, rows, columns = matrices.shape
    most = max(1, ELEMENTS_AT_ONCE // (rows * columns))
    num_chunks = -(-count // most)
    if num_chunks == 1:
        return _iterated(matrices, compute_dtype)
    size = -(-count // num_chunks)
    filled = jnp.pad(matrices, ((0, num_chunks * size - count), (0, 0), (0, 0)))
    chunks = filled.reshape(num_chunks, size, rows, columns)
    results = jax.lax.map(lambda chunk: _iterated(chunk, compute_dtype), chunks)
    return results.reshape(-1, rows, columns)[:count]


def _iterated(matrices: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
    tall = matrices.shape[-2] > matrices.shape[-1]
    y = _unit_norm((matrices.mT if tall else matrices).astype(jnp.float32)).astype(compute_dtype)
    # Without this, accelerators round float32 operands to fewer bits.
    precision = jax.lax.Precision.HIGHEST if compute_dtype == jnp.float32 else None

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, precision=precision, preferred_element_type=jnp.float32)

    def step(y: jax.Array, coefficients: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = coefficients
        gram = product(y, y.mT)
        low = gram.astype(compute_dtype)
        polynomial = b * gram + c * product(low, low)
        new = a * y.astype(jnp.float32) + product(polynomial.astype(compute_dtype), y)
        return new.astype(compute_dtype), None

    y, _ = jax.lax.scan(step, y, jnp.asarray(np.array(COEFFICIENTS, np.float32)))
    y = y.astype(jnp.float32)
    return y.mT if tall else y


def _unit_norm(matrices: jax.Array) -> jax.Array:
    """A / ||A||_F, and 0 for 0. Divided by its largest element, any other matrix has a norm of at least 1."""
    largest = jnp.abs(matrices).max((-2, -1), keepdims=True)
    scaled = matrices / jnp.where(largest == 0, 1, largest)
    norm = jnp.sqrt(jnp.square(scaled).sum((-2, -1), keepdims=True))
    return scaled / jnp.maximum(norm, 1)
