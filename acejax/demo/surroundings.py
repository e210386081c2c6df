"""What stands around the transformer in the demo, in FLUX's shapes: an autoencoder and a text encoder.

The autoencoder is 8x down to 16 channels and fitted in closed form: principal components of 8 x 8 patches as encoder,
ridge regression from 3 x 3 latents as decoder. The text encoder is a frozen table of random word vectors; a closed
vocabulary needs no more.
"""

import hashlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from acejax.demo.pictures import COLORS, PHOTOS, SHAPES, TEST_PHOTO
from acejax.errors import UserError
from acejax.lcu import CELL

CHANNELS = 16
TEXT_TOKENS = 6
TEXT_WIDTH = 64
# Latent channel i is scaled to std_i ** 0.4: with equal variance the loss would be spent on unpredictable fine detail.
WHITENING = 0.4
WORDS = tuple(sorted({"a", "an", "on", "make", "it", "the", "this", "and", *SHAPES, *COLORS, *PHOTOS} - {TEST_PHOTO}))

Autoencoder = dict[str, np.ndarray | jax.Array]


def fit_autoencoder(pictures: np.ndarray) -> Autoencoder:
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
    return (_to_patches(pictures) - params["mean"]) @ params["encode"]


def decode_latents(params: Autoencoder, latents: jax.Array) -> jax.Array:
    """Latents [B, h, w, 16] -> pictures [B, 8h, 8w, 3], not clamped."""
    padded = jnp.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    patches = jax.lax.conv_general_dilated(padded, jnp.asarray(params["decode"]), (1, 1), "VALID",
                                           dimension_numbers=("NHWC", "HWIO", "NHWC")) + params["offset"]
    batch, height, width, _ = patches.shape
    x = patches.reshape(batch, height, width, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * CELL, width * CELL, 3)


def _to_patches(pictures):
    batch, height, width, channels = pictures.shape
    x = pictures.reshape(batch, height // CELL, CELL, width // CELL, CELL, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // CELL, width // CELL, CELL * CELL * channels)


_PUNCTUATION = str.maketrans(dict.fromkeys(",.!?;:", " "))


def _vector(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(TEXT_WIDTH).astype(np.float32)


_TABLE = {word: _vector(word) for word in (*WORDS, "")}  # "" fills up to TEXT_TOKENS
_PLACES = np.stack([_vector(f"position {i}") for i in range(TEXT_TOKENS)]) / 2


def encode_prompts(prompts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts -> text [B, 6, 64] (word vectors with their place) and pooled [B, 64] (their sum), float32.

    Raises:
      UserError: a word that the small weights do not know, or too many words.
    """
    words = [prompt.lower().translate(_PUNCTUATION).split() for prompt in prompts]
    for line in words:
        unknown = [word for word in line if word not in _TABLE]
        if unknown:
            raise UserError(f"prompt {' '.join(line)!r}: the small weights do not know "
                            f"{', '.join(map(repr, unknown))}; they know: {', '.join(WORDS)}")
        if not 0 < len(line) <= TEXT_TOKENS:
            raise UserError(f"prompt {' '.join(line)!r} has {len(line)} words; the small weights read 1 to "
                            f"{TEXT_TOKENS}")
    text = np.stack([[_TABLE[word] for word in _fill(line)] for line in words])
    pooled = np.stack([np.sum([_TABLE[word] for word in line], axis=0) / 2 for line in words])
    return (text + _PLACES).astype(np.float32), pooled.astype(np.float32)


def _fill(words: Sequence[str]) -> list[str]:
    return [*words, *[""] * (TEXT_TOKENS - len(words))]
