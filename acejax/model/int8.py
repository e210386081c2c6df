"""Products of int8: a kernel as `acejax.adapt.quantize` holds it, activations rounded token by token.

A TPU's matrix unit multiplies int8 about twice as fast as bfloat16. The kernel is exact; a token's values are rounded
to 1/127 of its greatest, which docs/chips.md has the error of.
"""

import jax
import jax.numpy as jnp
import numpy as np

GREATEST = 127.0


@jax.custom_vjp
def product(x: jax.Array, q: jax.Array) -> jax.Array:
    """x [..., in] times q [in, *out] int8: [..., *out] float32, before the kernel's scales.

    The gradient of x is that of the product without rounding, in x's dtype; q has none. There is no forward-mode
    derivative.
    """
    rounded, scale = round_tokens(x)
    whole = jax.lax.dot_general(rounded, q, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return whole.astype(jnp.float32) * scale.reshape(*scale.shape[:-1], *(1,) * (q.ndim - 1))


def round_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [..., in], scale [..., 1] float32), x being about their product."""
    x = x.astype(jnp.float32)
    greatest = jnp.abs(x).max(-1, keepdims=True)
    scale = jnp.where(greatest == 0, 1.0, greatest) / GREATEST  # of a token that is not finite, neither is it
    return jnp.round(x / scale).astype(jnp.int8), scale


def _forward(x, q):
    return product(x, q), (q, jnp.zeros((), x.dtype))


def _backward(saved, gradient):
    q, like = saved
    outputs = tuple(range(1, q.ndim))
    leading = gradient.ndim - len(outputs)
    of_x = jax.lax.dot_general(gradient.astype(like.dtype), q.astype(like.dtype),
                               ((tuple(range(leading, gradient.ndim)), outputs), ((), ())))
    return of_x, np.zeros(q.shape, jax.dtypes.float0)


product.defvjp(_forward, _backward)
