"""Joint attention of a block's streams: their queries and keys normed and turned by position, then one attention.

Tokens of the streams stand one after the other, text first. On a TPU two kernels of `acejax.model.tpu` do all of it,
on arrays as the products before and after it have them; elsewhere XLA does, with the attention that is named.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from acejax.model.attention import attention, check_heads
from acejax.model.config import Execution
from acejax.model.rope import apply_rope
from acejax.model.tpu import attention as flash
from acejax.model.tpu.rotate import Stream, rotate

Rope = tuple[jax.Array, jax.Array]  # cos and sin, as `acejax.model.rope.rotations` gives them
Scales = tuple[jax.Array, jax.Array]


class Heads(NamedTuple):
    """Queries, keys and values of one stream, each [B, S, heads * head_dim], as they come from their product."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Per-head RMSNorm in float32; cast back before the scale, as the reference."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def attend(streams: Sequence[Heads], scales: Sequence[Scales], rope: Rope, lengths: jax.Array | None,
           execution: Execution) -> jax.Array:
    """What all tokens see of each other.

    Args:
      streams: text and image, or one stream of both.
      scales: [head_dim] of the query and the key norm, for each stream.
      rope: of all tokens.
      lengths: [B] valid tokens of all, a prefix, or None.
      execution: attention, its chip and how devices share it.

    Returns:
      [B, S, heads * head_dim] over all tokens; under `jax.checkpoint` it has the name "attention".

    Raises:
      ValueError: attention "flash" for heads that it does not take.
    """
    if execution.attention == "flash" and all(stream.query.shape[1] % flash.HEAD == 0 for stream in streams):
        check_heads(scales[0][0].size)
        kernels = functools.partial(_by_kernels, execution.chip)
        return execution.share(kernels, "heads")(tuple(streams), (rope, lengths), tuple(scales))
    parts = [(rms_norm(_heads(stream.query, query), query), rms_norm(_heads(stream.key, key), key),
              _heads(stream.value, key)) for stream, (query, key) in zip(streams, scales, strict=True)]
    query, key, value = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    flat = (part.reshape(*part.shape[:2], -1) for part in (apply_rope(query, *rope), apply_rope(key, *rope), value))
    each = execution.share(functools.partial(_named, execution.attention, query.shape[-1]), "heads")
    return checkpoint_name(each(tuple(flat), lengths, ()), "attention")


def _heads(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, scale.size)


def _named(implementation: str, size: int, heads, lengths, _):
    parts = (part.reshape(*part.shape[:2], -1, size) for part in heads)
    attended = attention(*parts, lengths, implementation)
    return attended.reshape(*attended.shape[:2], -1)


def _by_kernels(chip: str, streams, rows, scales):
    rope, lengths = rows
    flat = tuple(Stream(*stream, *norms) for stream, norms in zip(streams, scales, strict=True))
    query, key, value = rotate(flat, *rope, flash.GAIN)
    batch, tokens, _ = query.shape
    total = flash.padded(tokens)
    if lengths is None:
        lengths = jnp.full((batch,), tokens, jnp.int32)
    query, key, value = (jnp.pad(part, ((0, 0), (0, total - tokens), (0, 0))) for part in (query, key, value))
    return flash.attend(query, key, value, lengths, flash.tiles(chip, total))[:, :tokens]
