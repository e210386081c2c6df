"""The linear layer: the only place where a weight matrix meets an activation."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.model import int8
from acejax.model.config import stored

Multiply = Callable[[jax.Array, jax.Array], jax.Array]


class Dense(nn.Module):
    """x [..., in] -> [..., *features], computed in `dtype`; parameters are kept as they are stored.

    `features` may have several axes, e.g. (3, heads, head_dim), so that sharding falls on head edges. `zero` starts
    the kernel at zero (adaLN-zero modulation and the output layer).

    Two collections may stand beside "params": "lora" adds a low-rank product (`acejax.adapt.lora`), "quant" holds the
    kernel in eight bits, which "params" then lacks (`acejax.adapt.quantize`).

    With `parts` the first axis of `features` comes apart and the others are one: a list of [..., out], on a TPU each a
    product of its own. Its compiler turns and copies what it multiplies as one, and writes these as kernels read them.
    Their kernel may be held as `parts` [parts, in, out] in place of [in, *features] (`parts_first`); without `parts`, a
    kernel may be held as `flat` [in, out] (`flattened`).

    With `int8_products` a kernel that is held in int8 is multiplied as it is (`acejax.model.int8`).

    `reduce_dtype` is what gradients of parameters are summed in, over tokens, samples and devices; None is `dtype`.
    """

    features: tuple[int, ...]
    dtype: Any
    use_bias: bool = True
    zero: bool = False
    parts: bool = False
    gather: Callable[[jax.Array, str], jax.Array] = stored
    reduce_dtype: Any = None
    int8_products: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        x = x.astype(self.dtype)
        if self.has_variable("quant", "scale"):
            y = [(part.astype(jnp.float32) * one).astype(self.dtype)  # q is exact in bfloat16: scales can follow
                 for part, one in zip(self._held(x, "quant", "q"), self._apart(self.get_variable("quant", "scale")),
                                      strict=True)]
        elif self.has_variable("params", "parts"):
            y = self._held(x, "params", "kernel")
        elif self.has_variable("params", "flat"):
            y = jax.lax.optimization_barrier(x @ self.get_variable("params", "flat").astype(self.dtype))
            y = [y.reshape(*x.shape[:-1], *self.features)]  # else a TPU turns the kernel to what comes after
        else:
            shape = (x.shape[-1], *self.features)
            init = nn.initializers.zeros if self.zero else nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=tuple(range(1, len(shape))))
            kernel = self.param("kernel", init, shape, jnp.float32)
            y = self._trained(x, "kernel", kernel)
        if self.has_variable("lora", "a"):
            a, b, scale = (self.get_variable("lora", name) for name in ("a", "b", "scale"))
            (down,) = self._trained(x, "a", a)
            y = [part + more for part, more in zip(y, self._trained(down, "b", scaled(b, scale)), strict=True)]
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            bias = bias.astype(self.reduce_dtype or self.dtype)
            y = [add_bias(part, one) for part, one in zip(y, self._apart(bias), strict=True)]
        return y if self.parts else y[0]

    def _held(self, x: jax.Array, collection: str, leaf: str) -> list[jax.Array]:
        """x times a kernel of a collection, held as it is or by its parts."""
        parted = self.has_variable(collection, "parts")
        kernel = self.get_variable(collection, "parts" if parted else leaf)
        multiply = int8.product
        if not (self.int8_products and kernel.dtype == jnp.int8):
            multiply, kernel = None, kernel.astype(self.dtype)
        if not parted:
            return self._products(x, self._whole(leaf, kernel), multiply)
        parts = self.gather(kernel, "/".join((*self.path, "parts")))
        return [(multiply or operator.matmul)(x, part) for part in parts]

    def _trained(self, x: jax.Array, leaf: str, kernel: jax.Array) -> list[jax.Array]:
        """x times a kernel that is kept as it is trained, in any dtype."""
        bring = functools.partial(self._whole, leaf)
        if self.reduce_dtype is None:
            return self._products(x, bring(kernel.astype(self.dtype)))
        return summed_in(x, kernel, self._products, bring, self.reduce_dtype)

    def _products(self, x: jax.Array, kernel: jax.Array, multiply: Multiply | None = None) -> list[jax.Array]:
        """x [..., in] times kernel, as `_whole` gives it: of each part, or the whole as the only one."""
        if not self.parts or kernel.ndim < 3:
            return [(multiply or _tensordot)(x, kernel)]
        return list(jax.lax.platform_dependent(x, kernel,
                                               tpu=functools.partial(_each, multiply=multiply or operator.matmul),
                                               default=functools.partial(_together, multiply=multiply or _tensordot)))

    def _apart(self, values: jax.Array) -> list[jax.Array]:
        """What there is one of for each output [*features], as `_products`."""
        return list(values.reshape(len(values), -1)) if self.parts else [values]

    def _whole(self, leaf: str, kernel: jax.Array) -> jax.Array:
        """The kernel, brought together; one of parts as [in, parts, out]."""
        if self.parts and kernel.ndim > 2:
            leaf, kernel = f"{leaf}_parts", kernel.reshape(*kernel.shape[:2], -1)
        return self.gather(kernel, "/".join((*self.path, leaf)))


def parts_first(tree: dict[str, Any]) -> dict[str, Any]:
    """Trees of params or quantised kernels with the layers of several parts as a TPU multiplies them.

    "qkv/kernel" (or "q") [..., in, parts, heads, head_dim] is "qkv/parts" [..., parts, in, heads * head_dim], one leaf
    after the other: a sampler's loop would turn each of them at each step.
    """
    leaves = flatten_dict(tree)
    for path in [path for path in leaves if path[-2:] in (("qkv", "kernel"), ("qkv", "q"))]:
        leaves[(*path[:-1], "parts")] = _turned(leaves.pop(path))
    return unflatten_dict(leaves)


def flattened(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of params with "qkv/kernel" [..., in, parts, heads, head_dim] as "qkv/flat" [..., in, out].

    Of a stack that is held with small last axes a TPU turns each layer's kernel before it multiplies.
    """
    leaves = flatten_dict(tree)
    for path in [path for path in leaves if path[-2:] == ("qkv", "kernel")]:
        leaves[(*path[:-1], "flat")] = _flat(leaves.pop(path))
    return unflatten_dict(leaves)


@jax.jit
def _flat(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(*kernel.shape[:-3], -1)


@jax.jit
def _turned(kernel: jax.Array) -> jax.Array:
    return jnp.moveaxis(kernel.reshape(*kernel.shape[:-2], -1), -2, -3)


def _tensordot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel, axes=1)


def _each(x: jax.Array, kernel: jax.Array, multiply: Multiply = operator.matmul) -> tuple[jax.Array, ...]:
    """x [..., in] times each part of a kernel [in, parts, out]."""
    return tuple(multiply(x, kernel[:, part]) for part in range(kernel.shape[1]))


def _together(x: jax.Array, kernel: jax.Array, multiply: Multiply = _tensordot) -> tuple[jax.Array, ...]:
    """The same as one product."""
    return tuple(jnp.moveaxis(multiply(x, kernel), -2, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def summed_in(x: jax.Array, kernel: jax.Array, products: Callable[[jax.Array, jax.Array], list[jax.Array]],
              bring: Callable[[jax.Array], jax.Array], dtype: Any) -> list[jax.Array]:
    """products(x, bring(kernel)) in x's dtype, with a gradient of the kernel that is summed and travels in `dtype`.

    A product's own gradient comes in the dtype of what was multiplied, before other devices' parts are added to it.
    """
    return products(x, bring(kernel.astype(x.dtype)))


def _summed_forward(x, kernel, products, bring, dtype):
    whole = bring(kernel.astype(x.dtype))
    return products(x, whole), (x, whole, kernel)


def _summed_backward(products, bring, dtype, saved, gradients):
    x, whole, kernel = saved
    (of_x,) = jax.vjp(lambda x: products(x, whole), x)[1](gradients)
    leading = tuple(range(x.ndim - 1))
    of_whole = [jax.lax.dot_general(x, gradient, ((leading, leading), ((), ())), preferred_element_type=dtype)
                for gradient in gradients]
    of_whole = of_whole[0] if len(of_whole) == 1 else jnp.stack(of_whole, 1)
    (of_kernel,) = jax.vjp(bring, jnp.zeros(kernel.shape, dtype))[1](of_whole)
    return of_x, of_kernel.astype(kernel.dtype)


summed_in.defvjp(_summed_forward, _summed_backward)


@jax.custom_jvp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., *features] + bias [*features], in y's dtype; the bias takes its gradient in its own."""
    return y + bias.astype(y.dtype)


@add_bias.defjvp
def _add_bias(primals, tangents):
    y_tangent, bias_tangent = tangents
    spread = jax.lax.platform_dependent(bias_tangent, tpu=functools.partial(_spread, like=y_tangent),
                                        default=lambda bias: jnp.broadcast_to(bias, y_tangent.shape))
    return add_bias(*primals), y_tangent + spread.astype(y_tangent.dtype)


def _spread(bias: jax.Array, like: jax.Array) -> jax.Array:
    """bias in each row of [..., *features], as a matrix product of ones.

    Its transpose is a product too, where the sum over tokens that a broadcast has for one costs a TPU 30 times as much.
    (With fewer than 8 ones XLA makes a sum of it again.)
    """
    leading = like.ndim - bias.ndim
    ones = jnp.ones((*like.shape[:leading], 8), bias.dtype)
    return jnp.tensordot(ones, jnp.broadcast_to(bias / 8, (8, *bias.shape)), axes=1)


def scaled(b: jax.Array, scale: jax.Array) -> jax.Array:
    """b [r, *features] times scale [r, 1] or [r, features[0]], in float32; scale takes no gradient.

    Where scale is 0, b takes no gradient either.
    """
    return b.astype(jnp.float32) * jax.lax.stop_gradient(scale).reshape(scale.shape + (1,) * (b.ndim - 2))
