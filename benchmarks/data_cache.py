"""The feature cache of `acejax bench data`: encoders of FLUX's shapes without its weights."""

import pathlib
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from acejax.data.augment import AugmentConfig
from acejax.data.cache import build as cache
from acejax.data.cache.build import CacheConfig
from acejax.data.cache.features import Features
from acejax.data.encoders import Encoders
from acejax.data.layout import CanvasConfig
from acejax.data.sample import Sample

TEXT = 512, 4096, 768  # tokens, features of one, features of the pooled prompt


class Chosen(Sequence):
    """Some samples of a source."""

    def __init__(self, source: Sequence[Sample], order: Sequence[int]):
        self._source, self._order = source, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._order[index]]


def build(source: Sequence[Sample], order: Sequence[int], canvas: CanvasConfig, folder: pathlib.Path) -> Features:
    """The features of these samples, kept in the folder."""
    encoders = Encoders(pictures, prompts, "shapes alone", lambda prompt: prompt.encode().ljust(16)[:16], TEXT)
    config = CacheConfig(dir=str(folder / "cache"))
    settings = cache.settings("bench", {"order": list(order)}, canvas, AugmentConfig(), encoders, config, 0)
    return Features(config.dir, [cache.build(Chosen(source, order), settings, canvas, AugmentConfig(), encoders,
                                             config).index])


def pictures(batch: np.ndarray) -> np.ndarray:
    """[B, 8h, 8w, 3] -> [B, h, w, 16] bfloat16: every eighth pixel, over and over."""
    return np.tile(batch[:, ::8, ::8], 6)[..., :16].astype(ml_dtypes.bfloat16)


def prompts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Noise of the prompt's own."""
    rngs = [np.random.default_rng(list(text.encode())) for text in texts]
    return tuple(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]).astype(ml_dtypes.bfloat16)
                 for shape in (TEXT[:2], TEXT[2:]))
