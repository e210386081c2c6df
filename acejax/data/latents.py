"""Canvases -> latents, unit by unit: a reference is encoded once and serves what is kept and what is learnt alike.

The released code encodes each canvas whole, up to three times a sample with independent noise; canvases made with
parity are encoded whole here too, without the noise.
"""

from collections.abc import Callable, Sequence

import numpy as np

from acejax.data.canvas import Canvas, contents

EncodePictures = Callable[[np.ndarray], np.ndarray]


def encode(canvases: Sequence[Canvas], encode_pictures: EncodePictures) -> dict[str, np.ndarray]:
    """Canvases of one layout -> `edit`, `modify` (where split) and `target` (in training) latents [N, h, w, 16] and
    `mask` [N, 8h, 8w, 1] in [0, 1].
    """
    parts = [contents(canvas) for canvas in canvases]
    split = [canvases[0].mask.shape[1]] if canvases[0].joined else list(canvases[0].widths)
    ends = np.cumsum(split)[:-1]
    *references, edit = _units([part.edit for part in parts], ends, encode_pictures)
    features = {"edit": [*references, edit]}
    for field in ("modify", "target"):
        pictures = [getattr(part, field) for part in parts]
        if pictures[0] is not None:
            (own,) = _units([picture[:, -split[-1]:] for picture in pictures], [], encode_pictures)
            features[field] = [*references, own]
    if "modify" in features:  # nothing of a reference is to be changed: grey
        grey = [encode_pictures(np.zeros((1, parts[0].edit.shape[0], width, 3), np.float32)) for width in split[:-1]]
        features["modify"][:-1] = [np.repeat(unit, len(canvases), 0) for unit in grey]
    joined = {field: np.concatenate([np.asarray(unit) for unit in units], 2) for field, units in features.items()}
    return joined | {"mask": np.stack([part.mask for part in parts])}


def _units(pictures: Sequence[np.ndarray], ends: Sequence[int], encode_pictures: EncodePictures) -> list[np.ndarray]:
    return [encode_pictures(unit) for unit in np.split(np.stack(pictures), ends, 2)]
