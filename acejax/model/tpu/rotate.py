"""Queries and keys made ready for attention on a TPU: norm by head, rotary positions, a gain, in one pass.

Arrays are [B, S, heads * 128], as a matrix product writes them: a head is a column of whole tiles, so that nothing is
turned between the products before and after attention. XLA alone takes five passes for this and copies between them.
The formulas are those of `acejax.model.joint.rms_norm` and `acejax.model.rope.apply_rope`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a head, and of the hardware's registers
ROWS = (512, 256, 128)  # tokens at a time: the first that divides them
HEADS = 8  # heads at a time, at most
EPSILON = 1e-6
VMEM = 64 * 2**20


class Stream(NamedTuple):
    """What one stream brings to attention.

    Attributes:
      query, key, value: [B, S, heads * 128].
      query_scale, key_scale: [128] learned scales of the norms.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    query_scale: jax.Array
    key_scale: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def rotate(streams: tuple[Stream, ...], cos: jax.Array, sin: jax.Array, gain: float, interpret: bool = False
           ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of all streams, one after the other along the tokens.

    Args:
      streams: whose tokens are multiples of 128.
      cos, sin: [B, S, 128] float32 of all tokens (`acejax.model.rope.rotations`).
      gain: that queries are multiplied with at the end.
      interpret: run the kernel as plain jax, on any device.

    Returns:
      query, key, value [B, S, heads * 128].
    """
    return _forward(streams, cos, sin, gain, interpret)


def _save(streams, cos, sin, gain, interpret):
    return _forward(streams, cos, sin, gain, interpret), (streams, cos, sin)


def _back(gain, interpret, saved, cotangents):
    streams, cos, sin = saved
    gradients, start = [], 0
    for stream in streams:
        gradients.append(_backward(stream, cos, sin, cotangents, start, gain, interpret))
        start += stream.query.shape[1]
    return tuple(gradients), None, None


rotate.defvjp(_save, _back)


def _forward(streams, cos, sin, gain, interpret):
    total = sum(stream.query.shape[1] for stream in streams)
    joint, start = (), 0
    for stream in streams:
        joint = _write(stream, cos, sin, joint, total, start, gain, interpret)
        start += stream.query.shape[1]
    return joint


def _blocks(stream: Stream, start: int):
    """(grid, specs of the stream's arrays, of the joint ones', of cos and sin, of a scale)."""
    batch, size, width = stream.query.shape
    rows = next(rows for rows in ROWS if size % rows == 0 and start % rows == 0)
    heads = next(count for count in range(HEADS, 0, -1) if width % (count * LANES) == 0)
    first = start // rows
    grid = batch, size // rows, width // (heads * LANES)
    own = pl.BlockSpec((1, rows, heads * LANES), lambda b, i, h: (b, i, h))
    joint = pl.BlockSpec((1, rows, heads * LANES), lambda b, i, h: (b, first + i, h))
    table = pl.BlockSpec((1, rows, LANES), lambda b, i, h: (b, first + i, 0))
    scale = pl.BlockSpec((1, LANES), lambda b, i, h: (0, 0))
    return grid, own, joint, table, scale


def _write(stream, cos, sin, joint, total, start, gain, interpret):
    """The stream's rows of the joint arrays; those that other streams have written stay."""
    grid, own, place, table, scale = _blocks(stream, start)
    shape = jax.ShapeDtypeStruct((stream.query.shape[0], total, stream.query.shape[2]), stream.query.dtype)
    return pl.pallas_call(
        functools.partial(_forward_kernel, gain=gain), grid=grid, name="rotate_forward", interpret=interpret,
        in_specs=[own] * 3 + [scale] * 2 + [table] * 2 + [pl.BlockSpec(memory_space=pl.ANY)] * len(joint),
        out_specs=[place] * 3, out_shape=[shape] * 3, input_output_aliases={7 + i: i for i in range(len(joint))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM),
    )(*stream[:3], stream.query_scale[None], stream.key_scale[None], cos, sin, *joint)


def _forward_kernel(query, key, value, query_scale, key_scale, cos, sin, *rest, gain):
    query_out, key_out, value_out = rest[-3:]
    value_out[...] = value[...]
    for column in _columns(query):
        for x, scale, out, factor in ((query, query_scale, query_out, gain), (key, key_scale, key_out, 1.0)):
            normed, _, _ = _norm(x[0, :, column], scale[...])
            out[0, :, column] = (factor * _turn(normed, cos[0], sin[0])).astype(out.dtype)


def _columns(block) -> list[slice]:
    return [slice(start, start + LANES) for start in range(0, block.shape[2], LANES)]


def _norm(x, scale):
    """(what the norm gives, in float32 after its roundings; x / root mean square, rounded; 1 / root mean square)."""
    wide = x.astype(jnp.float32)
    root = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + EPSILON)
    unit = (wide * root).astype(x.dtype)
    return (unit * scale.astype(x.dtype)).astype(jnp.float32), unit, root


def _turn(x, cos, sin):
    """x cos + swapped(x) sin, where neighbours are swapped; sin is negative where the first of a pair stands."""
    even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    return x * cos + jnp.where(even, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1)) * sin


def _backward(stream, cos, sin, cotangents, start, gain, interpret) -> Stream:
    """The gradient of a stream from those of the joint arrays."""
    grid, own, place, table, scale = _blocks(stream, start)
    batch, steps, columns = grid
    sums = pl.BlockSpec((1, 1, 8, LANES), lambda b, i, h: (b, i, h, 0))  # of a block: row 0 queries', row 1 keys'
    *gradients, sums = pl.pallas_call(
        functools.partial(_backward_kernel, gain=gain), grid=grid, name="rotate_backward", interpret=interpret,
        in_specs=[own] * 2 + [scale] * 2 + [table] * 2 + [place] * 3, out_specs=[own] * 3 + [sums],
        out_shape=[jax.ShapeDtypeStruct(stream.query.shape, stream.query.dtype)] * 3
        + [jax.ShapeDtypeStruct((batch, steps, 8 * columns, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM),
    )(*stream[:2], stream.query_scale[None], stream.key_scale[None], cos, sin, *cotangents)
    sums = sums.reshape(-1, 8, LANES).sum(0)
    scales = (sums[i].astype(part.dtype) for i, part in enumerate((stream.query_scale, stream.key_scale)))
    return Stream(*gradients, *scales)


def _backward_kernel(query, key, query_scale, key_scale, cos, sin, query_in, key_in, value_in, query_out, key_out,
                     value_out, sums, *, gain):
    value_out[...] = value_in[...]
    totals = [jnp.zeros((1, LANES), jnp.float32)] * 2
    for column in _columns(query):
        for i, (x, scale, gradient, out, factor) in enumerate((
                (query, query_scale, query_in, query_out, gain), (key, key_scale, key_in, key_out, 1.0))):
            _, unit, root = _norm(x[0, :, column], scale[...])
            unit = unit.astype(jnp.float32)
            turned = factor * _turn(gradient[0, :, column].astype(jnp.float32), cos[0], -sin[0])
            totals[i] = totals[i] + (turned * unit).sum(0, keepdims=True)
            along = turned * scale[...].astype(jnp.float32)
            out[0, :, column] = (root * (along - unit * (along * unit).mean(-1, keepdims=True))).astype(out.dtype)
    sums[0, 0] = jnp.concatenate([*totals, jnp.zeros((6, LANES), jnp.float32)])
