"""The linear layer: the only place where a weight matrix meets an activation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dense(nn.Module):
    """x [..., in] -> [..., *features], computed in `dtype`; parameters are kept as they are stored.

    `features` may have several axes, e.g. (3, heads, head_dim), so that sharding falls on head edges. `zero` starts
    the kernel at zero (adaLN-zero modulation and the output layer).
    """

    features: tuple[int, ...]
    dtype: Any
    use_bias: bool = True
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], *self.features)
        init = nn.initializers.zeros if self.zero else nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=tuple(range(1, len(shape))))
        kernel = self.param("kernel", init, shape, jnp.float32)
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=1)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.features, jnp.float32).astype(self.dtype)
        return y
