"""Crop and stitch: work at the model's size around the mask, then put the result back into the picture."""

import dataclasses

import numpy as np
from PIL import Image, ImageFilter


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square window of a picture; it may reach beyond its edges, where pixels are mirrored."""

    top: int
    left: int
    side: int


def around(mask: np.ndarray, share: float, cells: int = 8) -> Crop:
    """The window in whose middle the mask's bounding box takes `share` of the side; mask [h, w], > 127 = inside.

    It is moved towards the inside of the picture where it fits, so that the model sees real surroundings, by whole
    cells, of which its side has `cells`, so that the box stays on the latent grid of a model of as many; less than one
    may be left outside. It always holds the whole mask.
    """
    rows, columns = (np.flatnonzero((mask > 127).any(axis)) for axis in (1, 0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    side = max(1, round(max(height, width) / share))

    def place(low: int, extent: int, limit: int) -> int:
        start, cell = low + extent / 2 - side / 2, side / cells
        if side > limit:
            return (limit - side) // 2
        start += max(0, -start) // cell * cell - max(0, start + side - limit) // cell * cell
        return int(min(max(round(start), low + extent - side), low))

    return Crop(place(rows[0], height, mask.shape[0]), place(columns[0], width, mask.shape[1]), side)


def whole(size: tuple[int, int]) -> Crop:
    """The window that holds a whole picture of height x width."""
    side = max(size)
    return Crop((size[0] - side) // 2, (size[1] - side) // 2, side)


def cut(picture: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The window of a picture [h, w, 3] or mask [h, w], resized to size x size (antialiased; a mask is binarised)."""
    rows, columns = (_mirror(start + np.arange(crop.side), limit)
                     for start, limit in ((crop.top, picture.shape[0]), (crop.left, picture.shape[1])))
    window = Image.fromarray(picture[np.ix_(rows, columns)])
    if picture.ndim == 2:
        return np.where(np.asarray(window.resize((size, size), Image.Resampling.BOX)) > 127, 255, 0).astype(np.uint8)
    return np.asarray(window.resize((size, size), Image.Resampling.LANCZOS))


def paste(picture: np.ndarray, result: np.ndarray, crop: Crop, mask: np.ndarray | None) -> np.ndarray:
    """Put a result [s, s, 3] back where its window was; outside the mask every pixel stays the picture's.

    The edge is feathered inwards over about 1/32 of the window.
    """
    height, width = picture.shape[:2]
    placed = picture.copy()
    big = np.asarray(Image.fromarray(result).resize((crop.side, crop.side), Image.Resampling.BICUBIC))
    top, left = max(0, crop.top), max(0, crop.left)
    bottom, right = min(height, crop.top + crop.side), min(width, crop.left + crop.side)
    placed[top:bottom, left:right] = big[top - crop.top:bottom - crop.top, left - crop.left:right - crop.left]
    if mask is None:
        return placed
    inside = (mask > 127).astype(np.float32)
    soft = Image.fromarray((inside * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(crop.side / 64))
    weight = (inside * np.clip(np.asarray(soft, np.float32) / 127.5 - 1, 0, 1) ** 0.5)[..., None]
    return np.rint(picture * (1 - weight) + placed * weight).astype(np.uint8)


def _mirror(index: np.ndarray, limit: int) -> np.ndarray:
    """Indices folded back into [0, limit) as often as needed."""
    if limit == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * limit - 2)
    return np.where(index < limit, index, 2 * limit - 2 - index)
