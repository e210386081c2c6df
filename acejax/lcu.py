"""LCU++: a condition unit's picture, mask and noisy latent side by side on the channel axis.

A unit is `[noisy | edit | modify | mask]` (paper section 3, `V++`); units (references, then the target) are joined
along the width and share one position grid. Channel, patch and mask-fold order: ACE_plus `modules/flux.py` and
black-forest-labs/flux `sampling.py`, which agree.

Latents are [B, h, w, 16] (h, w even, 8 pixels each), masks [B, 8h, 8w, 1] with 1 = generate here. A token is a 2 x 2
latent patch, 16 x 16 pixels; its feature index is `channel * 4 + row_in_patch * 2 + column_in_patch`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from acejax.model.rope import MAX_POSITION

PATCH = 2
CELL = 8  # pixels along one side of a latent pixel


def fold_mask(mask: jax.Array) -> jax.Array:
    """Mask [B, 8h, 8w, 1] -> [B, h, w, 64]: each 8 x 8 cell becomes channels `row * 8 + column`; nothing is lost."""
    batch, height, width, _ = mask.shape
    cells = mask.reshape(batch, height // CELL, CELL, width // CELL, CELL)
    return cells.transpose(0, 1, 3, 2, 4).reshape(batch, height // CELL, width // CELL, CELL * CELL)


def patchify(latents: jax.Array) -> jax.Array:
    """[B, h, w, C] -> tokens [B, h w / 4, 4 C], row by row.

    Raises:
      ValueError: an odd height or width.
    """
    batch, height, width, channels = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latents are {height} x {width}; both sides must be even (16 pixels a token)")
    x = latents.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `patchify`: tokens [B, S, 4 C] (padding beyond h w / 4 is dropped) -> [B, height, width, C]."""
    batch, _, features = tokens.shape
    rows, columns, channels = height // PATCH, width // PATCH, features // PATCH**2
    x = tokens[:, :rows * columns].reshape(batch, rows, columns, channels, PATCH, PATCH)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height, width, channels)


def positions(height: int, width: int) -> jax.Array:
    """Grid positions (0, row, column) of a canvas of height x width latent pixels: [h w / 4, 3] int32."""
    rows, columns = height // PATCH, width // PATCH
    if max(rows, columns) > MAX_POSITION:
        raise ValueError(f"a canvas of {rows} x {columns} tokens is beyond {MAX_POSITION} tokens a side")
    grid = jnp.indices((rows, columns), dtype=jnp.int32).reshape(2, -1)
    return jnp.pad(grid.T, ((0, 0), (1, 0)))


def join(units: Sequence[jax.Array]) -> jax.Array:
    """Join the units' arrays (pictures, masks or latents, [B, h, w_k, C]) along the width: references, then target.

    Raises:
      ValueError: units of different heights.
    """
    heights = [unit.shape[-3] for unit in units]
    if len(set(heights)) > 1:
        raise ValueError(f"units are joined along the width and must share one height; found {heights}")
    return jnp.concatenate(list(units), axis=-2)


def membership(height: int, widths: Sequence[int]) -> jax.Array:
    """Which unit each token of a canvas belongs to: [S, 1, units] of 0 and 1, the target last.

    `height` and `widths` are in latent pixels, each width even. This is what `acejax.flow.loss` splits by.
    """
    unit = jnp.repeat(jnp.arange(len(widths)), jnp.array([w // PATCH for w in widths]),
                      total_repeat_length=sum(w // PATCH for w in widths))
    return jnp.tile(jax.nn.one_hot(unit, len(widths)), (height // PATCH, 1))[:, None]


def channels(noisy: jax.Array, edit: jax.Array | None = None, mask: jax.Array | None = None,
             modify: jax.Array | None = None) -> jax.Array:
    """A unit's parts as tokens, side by side: [B, S, 64, 384 or 448].

    Args:
      noisy, edit, modify: [B, S, 64], as by `patchify`.
      mask: [B, S, 256], as by `patchify` of `fold_mask`.

    Raises:
      ValueError: parts that do not make one of the three variants, or of different sizes.
    """
    given = tuple(name for name, part in (("edit", edit), ("modify", modify), ("mask", mask)) if part is not None)
    if given not in ((), ("edit", "mask"), ("edit", "modify", "mask")):
        raise ValueError(f"pack needs nothing (64), edit and mask (384) or edit, modify and mask (448); given: {given}")
    parts = [part for part in (noisy, edit, modify, mask) if part is not None]
    if any(part.shape[:2] != noisy.shape[:2] for part in parts):
        raise ValueError(f"the parts of a unit differ in size: {[part.shape for part in parts]}")
    return jnp.concatenate([part.astype(noisy.dtype) for part in parts], axis=-1)


def pack(noisy: jax.Array, edit: jax.Array | None = None, mask: jax.Array | None = None,
         modify: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """A canvas as transformer input.

    Args:
      noisy: [B, h, w, 16] noisy latents of the whole canvas.
      edit: [B, h, w, 16] latents of what is kept (or of the edit picture); with `mask` gives 384 channels.
      mask: [B, 8h, 8w, 1], 1 = generate.
      modify: [B, h, w, 16] latents of what is to be changed; with `edit` and `mask` gives 448 channels.

    Returns:
      image [B, h w / 4, 64, 384 or 448] and positions [B, h w / 4, 3].

    Raises:
      ValueError: parts that do not make one of the three variants, or of different sizes.
    """
    if mask is not None and mask.shape[1:] != (CELL * noisy.shape[1], CELL * noisy.shape[2], 1):
        raise ValueError(f"mask {mask.shape} does not cover latents {noisy.shape} at {CELL} pixels each")
    shapes = [part.shape for part in (noisy, edit, modify) if part is not None]
    if len({shape[:3] for shape in shapes}) > 1:
        raise ValueError(f"the parts of a unit differ in size: {shapes}")
    tokens = [part if part is None else patchify(part)
              for part in (noisy, edit, None if mask is None else fold_mask(mask), modify)]
    image = channels(*tokens)
    grid = positions(*noisy.shape[1:3])
    return image, jnp.broadcast_to(grid, (image.shape[0], *grid.shape))


def pad(tokens: jax.Array, size: int) -> jax.Array:
    """Pad the token axis of [B, S, ...] with zeros at its end, up to `size`.

    Raises:
      ValueError: more tokens than `size`.
    """
    if tokens.shape[1] > size:
        raise ValueError(f"{tokens.shape[1]} tokens do not fit into {size}")
    return jnp.pad(tokens, ((0, 0), (0, size - tokens.shape[1]), *((0, 0),) * (tokens.ndim - 2)))
