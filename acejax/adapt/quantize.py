"""Kernels in eight bits, one float32 scale per output channel: half of bfloat16's memory, dequantised where used."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.adapt.targets import ACE_PLUS, select, stacked
from acejax.model import mmdit
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.mmdit import Params, Tokens

KINDS = {"int8": (jnp.int8, 127.0), "float8": (jnp.float8_e4m3fn, 448.0)}  # dtype and its greatest number


def quantize(params: Params, kind: str = "int8", targets: str | Sequence[str] = ACE_PLUS) -> tuple[Params, Params]:
    """(params, quant): the targeted kernels leave `params` and stand in `quant` as {"q", "scale"}.

    q has the kernel's shape and scale [layers, *features] float32, with W = scale q; symmetric, an output channel's
    greatest weight on the greatest number. `acejax.apply(..., quant=quant)` takes both trees.

    Args:
      params: as by `acejax.init`.
      kind: "int8", or "float8" (E4M3).
      targets: as `acejax.adapt.targets.select`.

    Raises:
      ValueError: an unknown kind.
      UserError: a target that matches nothing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known: {', '.join(KINDS)}")
    left, quant = flatten_dict(params, sep="/"), {}
    for module in select(params, targets):
        q, scale = quantize_kernel(left.pop(f"{module}/kernel"), kind, inputs=int(stacked(module)))
        quant |= {f"{module}/q": q, f"{module}/scale": scale}
    return unflatten_dict(left, sep="/"), unflatten_dict(quant, sep="/")


def dequantize(params: Params, quant: Params, dtype: Any = jnp.float32) -> Params:
    """`params` with the kernels that `quant` stands for, in `dtype`."""
    leaves, whole = flatten_dict(quant, sep="/"), flatten_dict(params, sep="/")
    for module in {path.rpartition("/")[0] for path in leaves}:
        scale = jnp.expand_dims(leaves[f"{module}/scale"], 1 if stacked(module) else 0)
        whole[f"{module}/kernel"] = (leaves[f"{module}/q"].astype(jnp.float32) * scale).astype(dtype)
    return unflatten_dict(whole, sep="/")


def report(config: MMDiTConfig, params: Params, kind: str = "int8", targets: str | Sequence[str] = ACE_PLUS,
           tokens: Tokens | None = None, execution: Execution = Execution()) -> dict[str, Any]:
    """What quantisation costs, as relative root mean square errors.

    Args:
      config: the model.
      params: its parameters, not quantised.
      kind: as `quantize`.
      targets: as `quantize`.
      tokens: what to compute the velocity of; None draws a small batch.
      execution: how to compute it.

    Returns:
      "layers": error of each kernel by module path, a list over the layers of a stack; "velocity": error of the output.
    """
    left, quant = quantize(params, kind, targets)
    exact, found = (flatten_dict(tree, sep="/") for tree in (params, quant))
    layers = {}
    for module in select(params, targets):
        trio = exact[f"{module}/kernel"], found[f"{module}/q"], found[f"{module}/scale"]
        layers[module] = jnp.atleast_1d(_kernel_errors(*trio, inputs=int(stacked(module)))).tolist()
    tokens = _some_tokens(config) if tokens is None else tokens
    exact = _apply(config, params, tokens, execution=execution)
    velocity = _error(exact, _apply(config, left, tokens, quant=quant, execution=execution), range(exact.ndim))
    return {"layers": layers, "velocity": float(velocity)}


@functools.partial(jax.jit, static_argnames=("kind", "inputs"))
def quantize_kernel(kernel: jax.Array, kind: str, inputs: int) -> tuple[jax.Array, jax.Array]:
    """(q, scale); `inputs` is the axis that shares a scale. One program: no float32 copy of the kernel is made."""
    dtype, greatest = KINDS[kind]
    kernel = kernel.astype(jnp.float32)
    scale = jnp.abs(kernel).max(inputs, keepdims=True) / greatest
    scale = jnp.where(scale > 0, scale, 1.0)  # a channel of zeros
    q = jnp.clip(kernel / scale, -greatest, greatest)  # beyond 448 E4M3 has only nan
    return (jnp.round(q) if dtype == jnp.int8 else q).astype(dtype), scale.squeeze(inputs)


@functools.partial(jax.jit, static_argnames="inputs")
def _kernel_errors(kernel: jax.Array, q: jax.Array, scale: jax.Array, inputs: int) -> jax.Array:
    """[layers], or one number for a kernel that is not stacked."""
    return _error(kernel, q.astype(jnp.float32) * jnp.expand_dims(scale, inputs), range(inputs, q.ndim))


def _error(exact: jax.Array, found: jax.Array, axes: Sequence[int]) -> jax.Array:
    exact, found = exact.astype(jnp.float32), found.astype(jnp.float32)
    return jnp.sqrt(jnp.square(found - exact).sum(axes) / jnp.square(exact).sum(axes))


_apply = jax.jit(mmdit.apply, static_argnums=0, static_argnames="execution")


def _some_tokens(config: MMDiTConfig) -> Tokens:
    """Normal features for two samples of 64 tokens on one row, sigma 0.5."""
    shapes, random = mmdit.example(config, batch=2, image=64, text=8), np.random.default_rng(0)
    drawn = {name: random.standard_normal(getattr(shapes, name).shape, np.float32)
             for name in ("image", "text", "pooled")}
    positions = np.zeros(shapes.positions.shape, np.int32)
    positions[..., 2] = np.arange(64)
    return Tokens(positions=positions, sigma=np.full(2, 0.5, np.float32), guidance=np.full(2, 3.5, np.float32), **drawn)
