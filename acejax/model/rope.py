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
    """cos and sin [MAX_POSITION, dim / 2] of one axis."""
    omega = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.arange(MAX_POSITION, dtype=np.float64)[:, None] * omega
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotations(positions: jax.Array, axes_dim: tuple[int, ...], theta: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B, S, head_dim / 2] float32, for integer positions [B, S, 3].

    A position outside [0, MAX_POSITION) gives NaN: a wrong angle would not be noticed.
    """
    parts = []
    for axis, dim in enumerate(axes_dim):
        index = jnp.where(positions[..., axis] < 0, MAX_POSITION, positions[..., axis])
        parts.append([jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan) for table in _table(dim, theta)])
    cos, sin = zip(*parts, strict=True)
    return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the interleaved pairs (x[2n], x[2n + 1]) of x [B, heads, S, head_dim].

    Computed in float32; x's dtype comes back.
    """
    return jax.lax.platform_dependent(x, cos, sin, tpu=_by_product, default=_by_pairs)


def _by_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    rotated = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x cos + (x P) sin, P the signed permutation that takes (a, b) to (-b, a).

    On a TPU the last axis lies over 128 lanes, where an axis of 2 costs more than the matrix product that turns it.
    """
    turn = np.zeros((x.shape[-1], x.shape[-1]), np.float32)
    turn[1::2, ::2] = -np.eye(x.shape[-1] // 2)
    turn[::2, 1::2] = np.eye(x.shape[-1] // 2)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    turned = jnp.dot(x, jnp.asarray(turn, x.dtype), precision=exact, preferred_element_type=jnp.float32)
    cos, sin = (jnp.repeat(part, 2, axis=-1)[:, None] for part in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
