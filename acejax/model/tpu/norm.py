"""LayerNorm and modulation on a TPU in one pass over the stream, forward and backward.

The formula is that of `acejax.model.mmdit.modulated_norm`. XLA alone reads the stream three times for it, makes the
result anew for each product that wants it, and reads it as often again for the gradients of shift and scale.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROWS = (256, 128, 64)  # tokens at a time: the first that divides them
LANES = 128
EPSILON = 1e-6
VMEM = 64 * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, interpret: bool = False) -> jax.Array:
    """(1 + scale) (x - mean) / deviation + shift, float32 inside.

    Args:
      x: [B, S, D], S a multiple of 64.
      shift, scale: [B, 1, D].
      interpret: run the kernel as plain jax, on any device.

    Returns:
      [B, S, D] in x's dtype.
    """
    own, row, grid, parameters = _blocks(x)
    return pl.pallas_call(
        _forward_kernel, grid=grid, in_specs=[own, row, row], out_specs=own, compiler_params=parameters,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="norm_forward", interpret=interpret)(x, shift, scale)


def _save(x, shift, scale, interpret):
    return modulated_norm(x, shift, scale, interpret), (x, shift, scale)


def _back(interpret, saved, gradient):
    x, shift, scale = saved
    own, row, grid, parameters = _blocks(x)
    sums = jax.ShapeDtypeStruct(shift.shape, jnp.float32)
    along, of_shift, of_scale = pl.pallas_call(
        _backward_kernel, grid=grid, in_specs=[own, row, own], out_specs=[own, row, row], compiler_params=parameters,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums], name="norm_backward", interpret=interpret,
    )(x, scale, gradient)
    return along, of_shift.astype(shift.dtype), of_scale.astype(scale.dtype)


modulated_norm.defvjp(_save, _back)


def takes(x: jax.Array) -> bool:
    """Whether x [B, S, D] falls into whole tiles."""
    return x.shape[1] % ROWS[-1] == 0 and x.shape[2] % LANES == 0


def _blocks(x: jax.Array):
    batch, size, width = x.shape
    rows = next(rows for rows in ROWS if size % rows == 0)
    own = pl.BlockSpec((1, rows, width), lambda b, i: (b, i, 0))
    row = pl.BlockSpec((1, 1, width), lambda b, i: (b, 0, 0))
    parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM)
    return own, row, (batch, size // rows), parameters


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """((x - mean) / deviation, 1 / deviation) in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    root = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + EPSILON)
    return wide * root, root


def _forward_kernel(x, shift, scale, out):
    unit, _ = _unit(x[0])
    out[0] = ((1 + scale[0].astype(jnp.float32)) * unit + shift[0].astype(jnp.float32)).astype(out.dtype)


def _backward_kernel(x, scale, gradient, out, of_shift, of_scale):
    @pl.when(pl.program_id(1) == 0)
    def _():
        of_shift[...] = jnp.zeros_like(of_shift)
        of_scale[...] = jnp.zeros_like(of_scale)

    unit, root = _unit(x[0])
    wide = gradient[0].astype(jnp.float32)
    of_shift[0] += wide.sum(0, keepdims=True)
    of_scale[0] += (wide * unit).sum(0, keepdims=True)
    along = (1 + scale[0].astype(jnp.float32)) * wide
    along = along - along.mean(-1, keepdims=True) - unit * (along * unit).mean(-1, keepdims=True)
    out[0] = (root * along).astype(out.dtype)
