"""The FLUX autoencoder: pictures [B, 8h, 8w, 3] to latents [B, h, w, 16] and back, over a plain nested dict of arrays.

A convolutional VAE with one attention in the middle of each half. Formulas: black-forest-labs/flux
`modules/autoencoder.py`; sampling and the clamp of its log variance: ACE_plus (scepter) `AutoencoderKLFlux`.

The tree has BFL's structure: `encoder/down_{level}/block_{b}`, `decoder/up_{level}/block_{b}` (level 0 is the finest
in both), `mid`, convolutions [kh, kw, in, out]. The attention's 1x1 convolutions are linear layers [in, out] here.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.model.attention import attention
from acejax.model.config import AutoencoderConfig
from acejax.model.dense import Dense

Params = dict[str, Any]
COLORS = 3
LOGVAR = (-30.0, 20.0)
SMALLEST_TILE = 4  # cells; a quarter of a tile overlaps the next one


def norm(config: AutoencoderConfig, name: str) -> nn.GroupNorm:
    """Group norm in float32, its variance in two passes.

    E[x^2] - E[x]^2 loses the variance of what is nearly constant, and a grey picture is: eps is 1e-6.
    """
    return nn.GroupNorm(config.num_groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)


def conv(features: int, dtype: Any, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, name=name, conv_general_dilated=convolve)


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]],
             **plain: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of x [B, h, w, in] and kernel [kh, kw, in, out]; on a TPU by rows (`by_rows`)."""
    whole = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **plain)
    if kernel.shape[0] == 1:
        return whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, tpu=functools.partial(by_rows, strides=strides, padding=padding),
                                      default=whole)


def by_rows(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> jax.Array:
    """A convolution along rows alone: each row of the picture is a sample, and has the channels of all rows that it is
    made of.

    Of a batch of few large pictures XLA makes a larger batch of parts that overlap, and on a TPU it copies more than
    it multiplies.
    """
    batch, _, width, channels = x.shape
    rows = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0)))
    height = (x.shape[1] - rows) // strides[0] + 1
    taken = [jax.lax.slice_in_dim(x, row, row + (height - 1) * strides[0] + 1, strides[0], axis=1)
             for row in range(rows)]
    x = jnp.concatenate(taken, -1).reshape(batch * height, width, rows * channels)
    y = jax.lax.conv_general_dilated(x, kernel.swapaxes(0, 1).reshape(kernel.shape[1], rows * channels, -1),
                                     strides[1:], padding[1:], dimension_numbers=("NWC", "WIO", "NWC"))
    return y.reshape(batch, height, *y.shape[1:])


class ResBlock(nn.Module):
    """Two times norm, swish, 3x3 convolution; plus the input, through a 1x1 convolution when the width changes."""

    config: AutoencoderConfig
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = conv(self.features, self.dtype, "conv1")(nn.silu(norm(self.config, "norm1")(x)))
        y = conv(self.features, self.dtype, "conv2")(nn.silu(norm(self.config, "norm2")(y)))
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Norm, one attention head over all positions, plus the input; long pictures go by chunks of queries."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        y = norm(self.config, "norm")(x).reshape(batch, height * width, 1, channels)
        q, k, v = (Dense((channels,), self.dtype, name=name)(y) for name in "qkv")
        return x + Dense((channels,), self.dtype, name="proj")(attention(q, k, v).reshape(x.shape))


class Mid(nn.Module):
    """ResBlock, attention, ResBlock at the coarsest level."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResBlock(self.config, x.shape[-1], self.dtype, name="block_0")(x)
        x = Attention(self.config, self.dtype, name="attention")(x)
        return ResBlock(self.config, x.shape[-1], self.dtype, name="block_1")(x)


class Level(nn.Module):
    """The ResBlocks of one resolution, then the step to the next: "downsample", "upsample" or None."""

    config: AutoencoderConfig
    features: int
    blocks: int
    step: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for b in range(self.blocks):
            x = ResBlock(self.config, self.features, self.dtype, name=f"block_{b}")(x)
        if self.step == "downsample":  # one row and column of zeros, at the bottom and the right alone
            return nn.Conv(self.features, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=self.dtype,
                           name=self.step, conv_general_dilated=convolve)(x)
        if self.step == "upsample":
            return conv(self.features, self.dtype, self.step)(x.repeat(2, axis=1).repeat(2, axis=2))
        return x


class Encoder(nn.Module):
    """Pictures [B, 8h, 8w, 3] -> [B, h, w, 2 z_channels]: mean, then log variance, not clamped; float32."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype, last = self.config, self.dtype, len(self.config.widths) - 1
        x = conv(c.ch, dtype, "conv_in")(x)
        for level, width in enumerate(c.widths):
            step = "downsample" if level < last else None
            x = Level(c, width, c.num_res_blocks, step, dtype, name=f"down_{level}")(x)
        x = nn.silu(norm(c, "norm_out")(Mid(c, dtype, name="mid")(x)))
        return conv(2 * c.z_channels, dtype, "conv_out")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """Unscaled latents [B, h, w, z_channels] -> pictures [B, 8h, 8w, 3], not clamped; float32."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c, dtype = self.config, self.dtype
        x = Mid(c, dtype, name="mid")(conv(c.widths[-1], dtype, "conv_in")(z))
        for level, width in reversed(list(enumerate(c.widths))):
            step = "upsample" if level else None
            x = Level(c, width, c.num_res_blocks + 1, step, dtype, name=f"up_{level}")(x)
        return conv(COLORS, dtype, "conv_out")(nn.silu(norm(c, "norm_out")(x))).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def init(config: AutoencoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters as a plain nested dict: `encoder` and `decoder`, each of use without the other.

    Kernels are normal with variance 1 / inputs, norms start at 1 and biases at 0.
    """
    def abstract(module, side, channels):
        x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
        return jax.eval_shape(module.init, key, x)["params"]

    leaves = flatten_dict({"encoder": abstract(Encoder(config), config.cell, COLORS),
                           "decoder": abstract(Decoder(config), 1, config.z_channels)})
    kernels = {path: leaf for path, leaf in leaves.items() if path[-1] == "kernel"}
    # one draw for all: a hundred take minutes to compile
    ends = np.cumsum([leaf.size for leaf in kernels.values()])
    drawn = dict(zip(kernels, jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1]), strict=True))
    return unflatten_dict({
        path: drawn[path].reshape(leaf.shape) * math.prod(leaf.shape[:-1]) ** -0.5 if path in drawn
        else jnp.full(leaf.shape, float(path[-1] == "scale")) for path, leaf in leaves.items()})


def moments(config: AutoencoderConfig, params: Params, pictures: jax.Array, *, tile: int | None = None,
            dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of the posterior over unscaled latents.

    Args:
      config: static, as `tile` and `dtype`.
      params: as by `init`; `encoder` is enough.
      pictures: [B, 8h, 8w, 3] in [-1, 1].
      tile: side in latent cells (8 pixels) of the squares that a larger picture is cut into, computed one after the
        other so that memory stays bounded. They overlap by a quarter and are blended. Norms and attention see one tile
        at a time, so the result is close to that of the whole picture, not equal. None: never cut.
      dtype: of activations and convolutions; norms and softmax are float32 throughout.

    Returns:
      Two arrays [B, h, w, z_channels], float32; the log variance is clamped to [-30, 20].

    Raises:
      ValueError: pictures that are no floats or of another shape, or a tile of fewer than 4 cells.
    """
    _check("pictures", pictures, COLORS, config.cell)

    def network(x):
        return Encoder(config, dtype).apply({"params": params["encoder"]}, x)

    mean, logvar = jnp.split(_by_tiles(network, pictures, 2 * config.z_channels, tile, config.cell, 1), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR)


def encode(config: AutoencoderConfig, params: Params, pictures: jax.Array, key: jax.Array | None = None, *,
           tile: int | None = None, dtype: Any = jnp.float32) -> jax.Array:
    """Pictures [B, 8h, 8w, 3] in [-1, 1] -> scaled latents [B, h, w, z_channels], float32.

    The posterior's mean, or with a `key` a sample of it (as ACE_plus does everywhere; FLUX no longer). The other
    arguments and errors are those of `moments`.
    """
    z, logvar = moments(config, params, pictures, tile=tile, dtype=dtype)
    if key is not None:
        z = z + jnp.exp(0.5 * logvar) * jax.random.normal(key, z.shape)
    return config.scale_factor * (z - config.shift_factor)


def decode(config: AutoencoderConfig, params: Params, latents: jax.Array, *, tile: int | None = None,
           dtype: Any = jnp.float32) -> jax.Array:
    """Scaled latents [B, h, w, z_channels] -> pictures [B, 8h, 8w, 3], float32, not clamped to [-1, 1].

    `params` needs `decoder` alone. The other arguments and errors are those of `moments`.
    """
    _check("latents", latents, config.z_channels, 1)

    def network(z):
        return Decoder(config, dtype).apply({"params": params["decoder"]}, z)

    return _by_tiles(network, latents / config.scale_factor + config.shift_factor, COLORS, tile, 1, config.cell)


def _check(name: str, x: jax.Array, channels: int, cell: int) -> None:
    """Floats [B, h, w, channels], sides positive multiples of `cell`."""
    if (len(x.shape) != 4 or x.shape[3] != channels or not all(side and side % cell == 0 for side in x.shape[1:3])
            or not jnp.issubdtype(x.dtype, jnp.floating)):
        sides = f" with h and w multiples of {cell}" if cell > 1 else ""
        raise ValueError(f"{name}: found {x.dtype} {tuple(x.shape)}, expected floats [B, h, w, {channels}]{sides}")


def _by_tiles(network: Callable[[jax.Array], jax.Array], x: jax.Array, channels: int, tile: int | None, cell_in: int,
              cell_out: int) -> jax.Array:
    """`network(x)`, or its blend over tiles if x is larger than one.

    `x` has `cell_in` points a latent cell on each side; what comes out has `cell_out`, and `channels`.
    """
    if tile is not None and tile < SMALLEST_TILE:
        raise ValueError(f"tile is {tile}; expected at least {SMALLEST_TILE} latent cells, or None")
    cells = [side // cell_in for side in x.shape[1:3]]
    if tile is None or max(cells) <= tile:
        return network(x)
    (rows, row_weights), (columns, column_weights) = (_cover(size, tile, cell_out) for size in cells)
    height, width = (min(size, tile) * cell_in for size in cells)

    def add(blend, place):
        row, column, row_weight, column_weight = place
        y = network(jax.lax.dynamic_slice(x, (0, row * cell_in, column * cell_in, 0),
                                          (x.shape[0], height, width, x.shape[3])))
        y = y * row_weight[:, None, None] * column_weight[:, None]
        corner = (0, row * cell_out, column * cell_out, 0)
        y = y + jax.lax.dynamic_slice(blend, corner, y.shape)
        return jax.lax.dynamic_update_slice(blend, y, corner), None

    blend = jnp.zeros((x.shape[0], *(size * cell_out for size in cells), channels), jnp.float32)
    row, column = (index.ravel() for index in np.indices((len(rows), len(columns))))
    places = (rows[row], columns[column], row_weights[row], column_weights[column])
    return jax.lax.scan(add, blend, places)[0]


def _cover(size: int, tile: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles along one axis: their first cells [n] and the weights [n, tile * cell] of their points.

    The weights rise and fall smoothly over a quarter of the tile, and add up to 1 at every point.
    """
    overlap = tile // 4
    count = 1 + max(0, math.ceil((size - tile) / (tile - overlap)))
    tile = min(tile, size)
    starts = np.round(np.linspace(0, size - tile, count)).astype(np.int32)
    inside = np.arange(tile * cell) + 0.5
    ramp = np.minimum(1, np.minimum(inside, inside[::-1]) / (overlap * cell))
    weights = np.broadcast_to(np.sin(np.pi / 2 * ramp) ** 2, (count, tile * cell))
    points = starts[:, None] * cell + np.arange(tile * cell)
    total = np.zeros(size * cell)
    np.add.at(total, points, weights)
    return starts, (weights / total[points]).astype(np.float32)
