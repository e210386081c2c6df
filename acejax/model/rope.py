"""Rotary position embedding over three integer axes, as FLUX uses it.

Tables are made by numpy in float64 and gathered in the graph, because positions are traced arrays and jax computes in
float32 (source: `rope` and `apply_rope` in black-forest-labs/flux `modules/layers.py`, `math.py`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

MAX_POSITION = 2048  # tokens along one side of a canvas: 32,768 pixels


@functools.lru_cache(maxsize=16)
def _table(dim: int, theta: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [MAX_POSITION, dim] of one axis, as `rotations` has them."""
    omega = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.arange(MAX_POSITION, dtype=np.float64)[:, None] * omega
    cos, sin = np.cos(angle), np.sin(angle)
    pairs = np.stack([cos, cos], -1), np.stack([-sin, sin], -1)
    return tuple(pair.reshape(MAX_POSITION, dim).astype(np.float32) for pair in pairs)


def rotations(positions: jax.Array, axes_dim: tuple[int, ...], theta: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B, S, head_dim] float32, for integer positions [B, S, 3].

    Both elements of a pair have its cosine; the first has the negative sine, the second the sine. A position outside
    [0, MAX_POSITION) gives NaN: a wrong angle would not be noticed.
    """
    parts = []
    for axis, dim in enumerate(axes_dim):
        index = jnp.where(positions[..., axis] < 0, MAX_POSITION, positions[..., axis])
        parts.append([jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan) for table in _table(dim, theta)])
    cos, sin = zip(*parts, strict=True)
    return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the interleaved pairs (x[2n], x[2n + 1]) of x [B, S, heads, head_dim].

    Computed in float32; x's dtype comes back. On a TPU `acejax.model.tpu.rotate` does the same in a kernel.
    """
    wide = x.astype(jnp.float32)
    swapped = wide.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return (wide * cos[:, :, None] + swapped * sin[:, :, None]).astype(x.dtype)
