"""What stands around the transformer in the demo beside its autoencoder: a text encoder in FLUX's shape.

It is a frozen table of random word vectors; a closed vocabulary needs no more.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from acejax.demo.pictures import COLORS, PHOTOS, SHAPES, TEST_PHOTO
from acejax.errors import UserError

TEXT_TOKENS = 6
TEXT_WIDTH = 64
WORDS = tuple(sorted({"a", "an", "on", "make", "it", "the", "this", "and", "remove", *SHAPES, *COLORS, *PHOTOS}
                     - {TEST_PHOTO}))

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
