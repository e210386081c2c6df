"""Two ways of resizing: antialiased for what is looked at, and the released code's nearest-exact for parity."""

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]
Picture = np.ndarray | Image.Image  # uint8 [h, w, 3], or [h, w] a mask; Pillow's spare two copies


def antialiased(picture: Picture, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """A picture, or its part (top, left, height, width), at `size` (height, width), [h, w, 3] uint8; bicubic."""
    return _resize(picture, size, box, Image.Resampling.BICUBIC)


def mask(picture: Picture, size: tuple[int, int], box: Box | None = None, least: int = 128) -> np.ndarray:
    """As `antialiased` for a mask, [h, w]; 255 where at least `least` of 255 of a pixel is white, else 0."""
    white = _resize(picture, size, box, Image.Resampling.BOX) >= least
    return np.negative(white.view(np.uint8))  # 1 -> 255


def shape(picture: Picture) -> tuple[int, int]:
    """Height and width."""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]


def nearest_exact(length: int, wanted: int) -> np.ndarray:
    """Index of the source pixel of each of `wanted` pixels: torch's "nearest-exact" on a CPU, to the last bit.

    The step between pixels is a float32 there, which decides where a pixel's middle falls between two source pixels.
    """
    step = float(np.float32(length) / np.float32(wanted))
    middle = ((np.arange(wanted) + 0.5) * step - 0.5).astype(np.float32) + np.float32(0.5)
    return np.clip(np.floor(middle), 0, length - 1).astype(np.int64)


def nearest(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, ...] at `size` by `nearest_exact`."""
    return array[nearest_exact(array.shape[0], size[0])][:, nearest_exact(array.shape[1], size[1])]


def _resize(picture: Picture, size: tuple[int, int], box: Box | None, filter: Image.Resampling) -> np.ndarray:
    top, left, height, width = box or (0, 0, *shape(picture))
    if (height, width) == tuple(size):
        return np.asarray(picture)[top:top + height, left:left + width]
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    return np.asarray(image.resize(size[::-1], filter, (left, top, left + width, top + height), reducing_gap=3.0))
