"""Random weights and batches for speed: never zeros, on which a GPU is faster than on data."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acejax import lcu
from acejax.model import mmdit
from acejax.model.config import MMDiTConfig

SIZE = 0.02  # standard deviation of a weight


def grid(tokens: int) -> tuple[int, int]:
    """Latent pixels (height, width) of the squarest canvas of so many tokens."""
    rows = max(rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0)
    return lcu.PATCH * rows, lcu.PATCH * (tokens // rows)


def weights(config: MMDiTConfig, dtype: Any, each: Callable[[str, jax.Array], Mapping[str, jax.Array]] | None = None
            ) -> dict[str, Any]:
    """Parameters of the model, drawn on the device one leaf after the other in `dtype`.

    `each` is what to keep in a leaf's place, by path (`acejax.train.lora.hold`); then all is a dict by path.
    """
    shapes = jax.eval_shape(functools.partial(mmdit.init, config), jax.random.key(0))
    number = iter(range(1_000_000))

    def draw(path: Any, leaf: Any) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return _normal(next(number), leaf.shape, jnp.dtype(dtype), mean)

    if each is None:
        return jax.tree_util.tree_map_with_path(draw, shapes)
    kept = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        kept |= each("/".join(key.key for key in path), draw(path, leaf))
    return kept


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(seed: jax.Array, shape: tuple[int, ...], dtype: Any, mean: float) -> jax.Array:
    drawn = jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)
    return (mean + SIZE * drawn).astype(dtype)


def features(config: MMDiTConfig, samples: int, size: tuple[int, int], text: int, dtype: Any, seed: int = 0
             ) -> dict[str, np.ndarray]:
    """What the sampler reads of a request (`acejax.edit.sampler`), with noise; `size` in latent pixels."""
    random, (height, width) = np.random.default_rng(seed), size
    shapes = {name: (height, width, 16) for name in ("edit", "modify", "noise")} | {
        "text": (text, config.context_in_dim), "pooled": (config.vec_in_dim,)}
    drawn = {name: random.standard_normal((samples, *shape), np.float32) for name, shape in shapes.items()}
    drawn |= {name: drawn[name].astype(jnp.dtype(dtype)) for name in drawn if name != "noise"}
    return drawn | {"mask": random.integers(0, 2, (samples, 8 * height, 8 * width, 1)).astype(np.float32)}


def batch(config: MMDiTConfig, samples: int, size: tuple[int, int], text: int, dtype: Any, seed: int = 0
          ) -> dict[str, np.ndarray]:
    """A training batch (`acejax.data.stream.Batch`) without references and without padding."""
    random, tokens = np.random.default_rng(seed), size[0] * size[1] // lcu.PATCH**2
    shapes = {name: (tokens, 64) for name in ("edit", "modify", "target")} | {
        "text": (text, config.context_in_dim), "pooled": (config.vec_in_dim,)}
    drawn = {name: random.standard_normal((samples, *shape), np.float32).astype(jnp.dtype(dtype))
             for name, shape in shapes.items()}
    positions = np.broadcast_to(np.asarray(lcu.positions(*size)), (samples, tokens, 3))
    return drawn | {
        "mask": (255 * random.integers(0, 2, (samples, tokens, 256))).astype(np.uint8), "positions": positions,
        "unit": np.full((samples, tokens), -1, np.int8), "lengths": np.full(samples, tokens, np.int32),
        "task": np.zeros(samples, np.int32)}


def to_torch(arrays: Mapping[str, np.ndarray], device: str) -> dict[str, Any]:
    """As tensors, of the same numbers."""
    import torch

    def tensor(array: np.ndarray) -> Any:
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.array(array))  # a copy: jax's cannot be written to

    return {name: tensor(array).to(device) for name, array in arrays.items()}
