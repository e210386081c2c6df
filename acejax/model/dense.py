"""The linear layer: the only place where a weight matrix meets an activation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from acejax.model.config import stored


class Dense(nn.Module):
    """x [..., in] -> [..., *features], computed in `dtype`; parameters are kept as they are stored.

    `features` may have several axes, e.g. (3, heads, head_dim), so that sharding falls on head edges. `zero` starts
    the kernel at zero (adaLN-zero modulation and the output layer).

    Two collections may stand beside "params": "lora" adds a low-rank product (`acejax.adapt.lora`), "quant" holds the
    kernel in eight bits, which "params" then lacks (`acejax.adapt.quantize`).

    With `heads_first`, features (parts, heads, head_dim) of x [B, S, in] come as [parts, B, heads, S, head_dim], the
    order in which attention kernels read them: the TPU compiler writes a product in that order, but where it is turned
    after something has been added to it, it copies.
    """

    features: tuple[int, ...]
    dtype: Any
    use_bias: bool = True
    zero: bool = False
    heads_first: bool = False
    gather: Callable[[jax.Array, str], jax.Array] = stored

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        if self.has_variable("quant", "q"):
            q = self._whole("q", self.get_variable("quant", "q"))
            y = self._product(x, q.astype(self.dtype))  # exact in bfloat16, so that scales can follow the product
            y = (y.astype(jnp.float32) * self._of_outputs(self.get_variable("quant", "scale"))).astype(self.dtype)
        else:
            shape = (x.shape[-1], *self.features)
            init = nn.initializers.zeros if self.zero else nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=tuple(range(1, len(shape))))
            kernel = self.param("kernel", init, shape, jnp.float32)
            y = self._product(x, self._whole("kernel", kernel.astype(self.dtype)))
        if self.has_variable("lora", "a"):
            a, b, scale = (self.get_variable("lora", name) for name in ("a", "b", "scale"))
            down = jnp.tensordot(x, self._whole("a", a.astype(self.dtype)), axes=1)
            y = y + self._product(down, self._whole("b", scaled(b, scale).astype(self.dtype)))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            y = y + self._of_outputs(bias.astype(self.dtype))
        return y

    def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        if self.heads_first:
            return jnp.einsum("bsi,inhd->nbhsd", x, kernel)
        return jnp.tensordot(x, kernel, axes=1)

    def _of_outputs(self, values: jax.Array) -> jax.Array:
        """What there is one of for each output, laid out as the product."""
        return values[:, None, :, None] if self.heads_first else values

    def _whole(self, leaf: str, kernel: jax.Array) -> jax.Array:
        return self.gather(kernel, "/".join((*self.path, leaf)))


def scaled(b: jax.Array, scale: jax.Array) -> jax.Array:
    """b [r, *features] times scale [r, 1] or [r, features[0]], in float32; scale takes no gradient.

    Where scale is 0, b takes no gradient either.
    """
    return b.astype(jnp.float32) * jax.lax.stop_gradient(scale).reshape(scale.shape + (1,) * (b.ndim - 2))
