"""The linear layer: the only place where a weight matrix meets an activation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dense(nn.Module):
    """x [..., in] -> [..., *features], computed in `dtype`; parameters are kept as they are stored.

    `features` may have several axes, e.g. (3, heads, head_dim), so that sharding falls on head edges. `zero` starts
    the kernel at zero (adaLN-zero modulation and the output layer).

    Two collections may stand beside "params": "lora" adds a low-rank product (`acejax.adapt.lora`), "quant" holds the
    kernel in eight bits, which "params" then lacks (`acejax.adapt.quantize`).
    """

    features: tuple[int, ...]
    dtype: Any
    use_bias: bool = True
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        if self.has_variable("quant", "q"):
            y = quantized(x, self.get_variable("quant", "q"), self.get_variable("quant", "scale"))
        else:
            shape = (x.shape[-1], *self.features)
            init = nn.initializers.zeros if self.zero else nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=tuple(range(1, len(shape))))
            kernel = self.param("kernel", init, shape, jnp.float32)
            y = jnp.tensordot(x, kernel.astype(self.dtype), axes=1)
        if self.has_variable("lora", "a"):
            y = y + low_rank(x, *(self.get_variable("lora", name) for name in ("a", "b", "scale")))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.features, jnp.float32).astype(self.dtype)
        return y


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """(x a) (scale b) in x's dtype, without the product a b: that would cost as much as another kernel.

    a [in, r], b [r, *features], scale [r, 1] or [r, features[0]]; scale takes no gradient. Where it is 0, b takes none.
    """
    return jnp.tensordot(jnp.tensordot(x, a.astype(x.dtype), axes=1), scaled(b, scale).astype(x.dtype), axes=1)


def scaled(b: jax.Array, scale: jax.Array) -> jax.Array:
    """b [r, *features] times scale [r, 1 or features[0]], in float32."""
    return b.astype(jnp.float32) * jax.lax.stop_gradient(scale).reshape(scale.shape + (1,) * (b.ndim - 2))


def quantized(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """x (scale q): q [in, *features] is exact in bfloat16, so that one scale per output can be put on the result."""
    y = jnp.tensordot(x, q.astype(x.dtype), axes=1)
    return (y.astype(jnp.float32) * scale).astype(x.dtype)
