"""The demo's autoencoder in FLUX's shape, 8x down to 16 channels; a linear one, and a finer one that grows from it.

The linear one is fitted in closed form: principal components of 8 x 8 patches as encoder, ridge regression from 3 x 3
latents as decoder. The finer one adds to each side a few residual convolutions at the latents' resolution, trained by
Adam on the squared error with a little noise on the latents, so that the decoder learns to forgive what a transformer
leaves. They begin as the linear one's, and stay as easy to model. Once the transformer is trained, the decoder may
learn on from what that makes (`refine`), whose errors are no white noise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acejax.errors import UserError
from acejax.lcu import CELL
from acejax.parallel import processes

CHANNELS = 16
PATCH = CELL * CELL * 3
# Latent channel i is scaled to std_i ** 0.4: with equal variance the loss would be spent on unpredictable fine detail.
WHITENING = 0.4
KINDS = ("linear", "convolutional")
LINEAR_PICTURES = 1500  # that the linear one is fitted to, at most

Autoencoder = Mapping[str, np.ndarray | jax.Array]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Attributes:
      kind: "linear", or "convolutional"; but for `pictures` all below is for that one.
      pictures: training pictures that it is fitted to, at most.
      width: channels of its convolutions.
      encoder, decoder: residual blocks of each side.
      steps, batch: of its training.
      learning_rate: the greatest; it falls to zero along a cosine.
      noise: on the latents in training, in the standard deviations that they have at first.
      refine: steps of the decoder alone on what the trained transformer makes, half of each batch, from its samples of
        `drafts` training pictures.
    """

    kind: str = "linear"
    pictures: int = 1500
    width: int = 96
    encoder: int = 1
    decoder: int = 2
    steps: int = 4000
    batch: int = 16
    learning_rate: float = 1e-3
    noise: float = 0.1
    refine: int = 0
    drafts: int = 3000

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"autoencoder.kind is {self.kind!r}; expected {' or '.join(map(repr, KINDS))}")
        for field in ("pictures", "width", "steps", "batch", "learning_rate", "drafts"):
            if not getattr(self, field) > 0:
                raise UserError(f"autoencoder.{field} is {getattr(self, field)!r}; expected more than 0")
        if self.refine and self.kind == "linear":
            raise UserError(f"autoencoder.refine is {self.refine}; the linear kind has nothing to be trained")
        for field in ("encoder", "decoder", "noise", "refine"):
            if not getattr(self, field) >= 0:
                raise UserError(f"autoencoder.{field} is {getattr(self, field)!r}; expected 0 or more")


def fit(config: FitConfig, pictures: np.ndarray, seed: int = 0) -> Autoencoder:
    """An autoencoder of pictures [N, h, w, 3] uint8, a flat dict of float32 arrays; the finer kind's fit bfloat16."""
    linear = fit_linear(_normalize(pictures[:LINEAR_PICTURES]))
    return linear if config.kind == "linear" else _train(config, linear, pictures, seed)


def kind_of(params: Autoencoder) -> str:
    """The kind that these arrays are of."""
    return "convolutional" if "encoder.in.kernel" in params else "linear"


def fingerprint(params: Autoencoder) -> str:
    """A hash of all its numbers."""
    return xxhash.xxh3_64_hexdigest(b"".join(params[name].tobytes() for name in sorted(params)))


def fit_linear(pictures: np.ndarray) -> Autoencoder:
    """Fit to pictures [N, h, w, 3] in [-1, 1].

    Returns `encode` [192, 16], `mean` [192], `decode` [3, 3, 16, 192] and `offset` [192], float32.
    """
    patches = np.asarray(_to_patches(pictures))
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov(flat - mean, rowvar=False))
    values, vectors = values[::-1][:CHANNELS], vectors[:, ::-1][:, :CHANNELS]
    scale = values ** ((WHITENING - 1) / 2)
    encode = vectors * scale / np.sqrt(np.mean(values * scale**2))  # mean latent variance 1
    params = {"encode": encode.astype(np.float32), "mean": mean.astype(np.float32)}

    latents = np.pad(encode_pictures(params, pictures), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = patches.shape[1:3]
    around = np.concatenate([latents[:, dy:dy + height, dx:dx + width] for dy in range(3) for dx in range(3)], -1)
    inputs = around.reshape(-1, around.shape[-1]).astype(np.float64)
    center = inputs.mean(0)
    gram = (inputs - center).T @ (inputs - center)
    gram += 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram))
    decode = np.linalg.solve(gram, (inputs - center).T @ (flat - mean))
    return params | {"decode": decode.reshape(3, 3, CHANNELS, -1).astype(np.float32),
                     "offset": (mean - center @ decode).astype(np.float32)}


def encode_pictures(params: Autoencoder, pictures: jax.Array) -> jax.Array:
    """[B, 8h, 8w, 3] in [-1, 1] -> latents [B, h, w, 16]."""
    patches = _to_patches(pictures)
    latents = (patches - params["mean"]) @ params["encode"]
    return latents + _tower(params, "encoder", patches) if kind_of(params) == "convolutional" else latents


def decode_latents(params: Autoencoder, latents: jax.Array) -> jax.Array:
    """Latents [B, h, w, 16] -> pictures [B, 8h, 8w, 3], not clamped."""
    patches = _conv(latents, params["decode"]) + params["offset"]
    if "decoder.in.kernel" in params:
        patches = patches + _tower(params, "decoder", latents)
    batch, height, width, _ = patches.shape
    x = patches.reshape(batch, height, width, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * CELL, width * CELL, 3)


def _tower(params: Autoencoder, side: str, x: jax.Array) -> jax.Array:
    """Residual blocks of silu, 3 x 3, silu, 1 x 1."""
    def layer(name, x):
        return _conv(x, params[f"{side}.{name}.kernel"]) + params[f"{side}.{name}.bias"]

    x, number = layer("in", x), 0
    while f"{side}.{number}.a.kernel" in params:
        x = x + layer(f"{number}.b", jax.nn.silu(layer(f"{number}.a", jax.nn.silu(x))))
        number += 1
    return layer("out", jax.nn.silu(x))


def _init_tower(key: jax.Array, side: str, features: int, config: FitConfig, out: int, blocks: int
                ) -> dict[str, jax.Array]:
    width = config.width
    shapes = {"in": (3, 3, features, width)}
    for number in range(blocks):
        shapes |= {f"{number}.a": (3, 3, width, width), f"{number}.b": (1, 1, width, width)}
    shapes["out"] = (1, 1, width, out)
    params = {}
    for name, own in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        shape, gain = shapes[name], {"out": 0.01, "b": 0.3}.get(name.split(".")[-1], 1.0)  # begins as the linear one
        params[f"{side}.{name}.kernel"] = gain * np.sqrt(2 / np.prod(shape[:-1])) * jax.random.normal(own, shape)
        params[f"{side}.{name}.bias"] = jnp.zeros(shape[-1])
    return params


def refine(config: FitConfig, params: Autoencoder, pictures: np.ndarray, latents: np.ndarray, wanted: np.ndarray,
           weights: np.ndarray, seed: int = 0) -> Autoencoder:
    """The autoencoder with a decoder that has learnt what a transformer leaves; the encoder stays as it is.

    Args:
      config: of its training; `refine` are the steps.
      params: of the finer kind.
      pictures: [N, h, w, 3] uint8, which it goes on to be fitted to.
      latents, wanted, weights: [M, h / 8, w / 8, 16] that the transformer made, the pictures [M, h, w, 3] uint8 that
        they should decode to, and the weight of each pixel [M, h, w, 1].
      seed: of order, noise and what `fit` draws.
    """
    encoder = {name: jnp.asarray(value) for name, value in params.items() if _encodes(name)}
    decoder = {name: jnp.asarray(value) for name, value in params.items() if not _encodes(name)}

    def batch(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        chosen = rng.integers(len(latents), size=config.batch)
        return _draw(rng, pictures, config.batch), latents[chosen], _normalize(wanted[chosen]), weights[chosen]

    def loss(decoder, shown, made, wanted, weight, key):
        whole = encoder | decoder
        ours = weight * (decode_latents(whole, made) - wanted) ** 2
        return (_error(config, whole, shown, key) + jnp.mean(ours) / jnp.mean(weight)) / 2

    return _bfloat16(encoder | _descend(config, config.refine, decoder, loss, batch, seed, "decoder"))


def _train(config: FitConfig, linear: Autoencoder, pictures: np.ndarray, seed: int) -> Autoencoder:
    first, second, _ = jax.random.split(jax.random.key(seed), 3)
    params = {name: jnp.asarray(value) for name, value in linear.items()}
    params |= _init_tower(first, "encoder", PATCH, config, CHANNELS, config.encoder)
    params |= _init_tower(second, "decoder", CHANNELS, config, PATCH, config.decoder)
    params = _descend(config, config.steps, params, functools.partial(_error, config),
                      lambda rng: (_draw(rng, pictures, config.batch),), seed, "autoencoder")
    return _bfloat16(_unit(params, pictures[:256]))


def _error(config: FitConfig, params: Autoencoder, shown: jax.Array, key: jax.Array) -> jax.Array:
    latents = encode_pictures(params, shown)  # not over their deviation: a batch's own would blur the contrast
    latents = latents + config.noise * jax.random.normal(key, latents.shape)
    return jnp.mean((decode_latents(params, latents) - shown) ** 2)


def _descend(config: FitConfig, steps: int, params: Autoencoder, loss: Callable[..., jax.Array],
             batch: Callable[[np.random.Generator], tuple[np.ndarray, ...]], seed: int, name: str) -> Autoencoder:
    """`params` after so many steps of Adam on `loss(params, *batch(rng), key)`, over all devices of this process."""
    import optax  # editing, which reads this file too, need not wait for it

    key = jax.random.split(jax.random.key(seed), 3)[2]
    warmup = min(100, steps // 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, steps), b2=0.99))
    devices = jax.local_devices()[:math.gcd(config.batch, jax.local_device_count())]
    split = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))

    @jax.jit
    def step(params, state, shown, key):
        value, grads = jax.value_and_grad(loss)(params, *shown, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.device_put(params, NamedSharding(split.mesh, PartitionSpec()))
    state, rng, losses, every = optimizer.init(params), np.random.default_rng(seed), [], max(1, steps // 8)
    for number in range(1, steps + 1):
        params, state, value = step(params, state, jax.device_put(batch(rng), split), jax.random.fold_in(key, number))
        losses.append(value)
        if number % every == 0:
            error = float(np.mean(losses[-every:]))
            processes.say(f"{name}: step {number} of {steps}, {10 * np.log10(4 / error):.2f} dB")
    return {name: np.asarray(value) for name, value in params.items()}


def _bfloat16(params: Autoencoder) -> Autoencoder:
    return {name: np.asarray(value).astype(jnp.bfloat16).astype(np.float32) for name, value in params.items()}


def _encodes(name: str) -> bool:
    return name in ("encode", "mean") or name.startswith("encoder.")


def _draw(rng: np.random.Generator, pictures: np.ndarray, batch: int) -> np.ndarray:
    """Pictures in [-1, 1], half of them mirrored; a quarter has grey inside or outside of a box, as a canvas shows."""
    shown = _normalize(pictures[rng.integers(len(pictures), size=batch)])
    height, width = shown.shape[1:3]
    for picture in shown:
        if rng.integers(2):
            picture[:] = picture[:, ::-1].copy()
        if rng.integers(4) == 0:
            inside = np.zeros((height, width, 1), bool)
            top, left = CELL * rng.integers(height // CELL - 1), CELL * rng.integers(width // CELL - 1)
            inside[top:top + height // 2, left:left + width // 2] = True
            picture[:] = np.where(inside == bool(rng.integers(2)), 0, picture)
    return shown


def _unit(params: Autoencoder, pictures: np.ndarray) -> Autoencoder:
    """The same autoencoder with latents of mean variance 1."""
    scale = np.sqrt(np.asarray(encode_pictures(params, _normalize(pictures))).var((0, 1, 2)).mean())
    return dict(params) | {name: params[name] / scale for name in ("encode", "encoder.out.kernel", "encoder.out.bias")
                           } | {name: params[name] * scale for name in ("decode", "decoder.in.kernel")}


def _normalize(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float32) / 127.5 - 1


def _conv(x: jax.Array, kernel: np.ndarray | jax.Array) -> jax.Array:
    """A convolution that keeps the size; beyond the edge stands what lies on it."""
    if (reach := kernel.shape[0] // 2) > 0:
        x = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    return jax.lax.conv_general_dilated(x, jnp.asarray(kernel), (1, 1), "VALID",
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _to_patches(pictures: np.ndarray | jax.Array) -> jax.Array:
    batch, height, width, channels = pictures.shape
    x = pictures.reshape(batch, height // CELL, CELL, width // CELL, CELL, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // CELL, width // CELL, CELL * CELL * channels)
