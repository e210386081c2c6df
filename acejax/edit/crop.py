"""Windows: the part of a picture that the model works on, and how it is cut out."""

import dataclasses
import math

import numpy as np

from acejax.data import resize
from acejax.data.layout import visible
from acejax.data.released_layout import TOKEN, Size
from acejax.edit import masks

WIDEST = 2  # longest side of a window around a mask, in shortest sides, unless the mask is longer
ENLARGED = 4  # a window is not made more than this many times larger


@dataclasses.dataclass(frozen=True)
class Crop:
    """A window of a picture, in its pixels; it may reach beyond the edges, where pixels are mirrored."""

    top: int
    left: int
    height: int
    width: int


def middle(size: Size) -> Crop:
    """All of a picture of `size` (height, width), or its middle where it is beyond 4:1."""
    return Crop(*visible(size))


def around(mask: np.ndarray, share: float) -> Crop:
    """The window inside the picture whose sides the mask's bounding box takes `share` of; mask [h, w], > 127 = inside.

    It is no longer than 2:1 where the picture and the mask allow that.
    """
    (top, height), (left, width) = _box(mask)
    tall, wide = math.ceil(height / share), math.ceil(width / share)
    tall, wide = max(tall, math.ceil(wide / WIDEST)), max(wide, math.ceil(tall / WIDEST))
    tall, wide = min(tall, mask.shape[0]), min(wide, mask.shape[1])

    def place(low: int, extent: int, length: int, limit: int) -> int:
        return min(max(low + extent // 2 - length // 2, 0), limit - length)

    return Crop(place(top, height, tall, mask.shape[0]), place(left, width, wide, mask.shape[1]), tall, wide)


def square(mask: np.ndarray, share: float, cells: int = 8) -> Crop:
    """The square window in whose middle the mask's bounding box takes `share` of the side.

    It is moved towards the inside of the picture where it fits, so that the model sees real surroundings, by whole
    cells, of which its side has `cells`, so that the box stays on the latent grid of a model of as many; less than one
    may be left outside. A picture that is smaller lies in its middle, within half a cell. It always holds the whole
    mask.
    """
    (top, height), (left, width) = _box(mask)
    side = max(1, round(max(height, width) / share))

    def place(low: int, extent: int, limit: int) -> int:
        start, cell = low + extent / 2 - side / 2, side / cells
        if side > limit:  # the picture in its middle, within half a cell
            start += round((limit / 2 - low - extent / 2) / cell) * cell
        else:
            start += max(0, -start) // cell * cell - max(0, start + side - limit) // cell * cell
        return int(min(max(round(start), low + extent - side), low))

    return Crop(place(top, height, mask.shape[0]), place(left, width, mask.shape[1]), side, side)


def whole_square(size: Size) -> Crop:
    """The square window that holds a whole picture of height x width."""
    side = max(size)
    return Crop((size[0] - side) // 2, (size[1] - side) // 2, side, side)


def working_size(window: Crop, tokens: int) -> Size:
    """The size at which a window is worked on: enlarged up to the model's `tokens`, never more than four times."""
    k = min(ENLARGED, max(1.0, math.sqrt(tokens * TOKEN**2 / (window.height * window.width))))
    height, width = (max(TOKEN, int(side * k + 1e-6) // TOKEN * TOKEN) for side in (window.height, window.width))
    return height, width


def cut(picture: np.ndarray, window: Crop, size: Size) -> np.ndarray:
    """The window of a picture [h, w, 3] or mask [h, w] at `size` (antialiased; a mask is binarised, and nothing of it
    is lost that is too thin for half a pixel). Beyond the edges pictures are mirrored; there is no mask there.
    """
    resized = _kept if picture.ndim == 2 else resize.antialiased
    bottom, right = window.top + window.height, window.left + window.width
    if window.top >= 0 and window.left >= 0 and bottom <= picture.shape[0] and right <= picture.shape[1]:
        return resized(picture, size, (window.top, window.left, window.height, window.width))
    rows = _mirror(np.arange(window.top, bottom), picture.shape[0])
    columns = _mirror(np.arange(window.left, right), picture.shape[1])
    shown = picture[np.ix_(rows, columns)]
    if picture.ndim == 2:
        shown[:max(0, -window.top)] = shown[picture.shape[0] - window.top:] = 0
        shown[:, :max(0, -window.left)] = shown[:, picture.shape[1] - window.left:] = 0
    return resized(shown, size)


def _kept(mask: np.ndarray, size: Size, box: resize.Box | None = None) -> np.ndarray:
    """`resize.mask`, with what it touches only where that is beside no pixel of it: a wire, a scratch."""
    made = resize.mask(mask, size, box)
    return made | resize.mask(mask, size, box, least=1) & ~masks.grown(made, 1)


def _box(mask: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, height), (left, width) of what is inside the mask."""
    return tuple((int(where[0]), int(where[-1] - where[0] + 1)) for where in (
        np.flatnonzero((mask > 127).any(axis)) for axis in (1, 0)))


def _mirror(index: np.ndarray, limit: int) -> np.ndarray:
    """Indices folded back into [0, limit) as often as needed."""
    if limit == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * limit - 2)
    return np.where(index < limit, index, 2 * limit - 2 - index)
