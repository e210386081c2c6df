"""Putting a result back where its window was, so that every pixel outside the mask stays the picture's own."""

import math

import numpy as np
from PIL import Image, ImageFilter

from acejax.data import resize
from acejax.data.released_layout import Size
from acejax.edit.crop import Crop

CHANGED = 8.0, 24.0  # of 255: what differs by less has not changed, what differs by more has
STRIP = 256  # rows that are blended at a time: pictures may be large


def place(picture: np.ndarray, result: np.ndarray, window: Crop) -> np.ndarray:
    """A copy of the picture [h, w, 3] with the result [a, b, 3] in its window, as the model made it."""
    height, width = picture.shape[:2]
    placed = picture.copy()
    placed[_seen(window)] = _enlarged(result, window, (height, width))
    return placed


def feather(picture: np.ndarray, placed: np.ndarray, mask: np.ndarray, window: Crop, radius: float) -> np.ndarray:
    """`placed` inside the mask [h, w] (> 127), the picture outside; the edge is soft inwards, over about 2 `radius`.

    Where the mask is too thin for that (a wire, a scratch), over as much less as it is thinner.
    """
    pasted = picture.copy()
    inside = mask[_seen(window)] > 127
    if not inside.any():
        return pasted
    near = tuple(slice(max(0, where[0] - math.ceil(4 * radius)), where[-1] + 1 + math.ceil(4 * radius)) for where in (
        np.flatnonzero(inside.any(axis)) for axis in (1, 0)))
    weight = _weight(inside[near], radius)[..., None]
    part = pasted[_seen(window)][near]
    part[:] = np.rint(part * (1 - weight) + placed[_seen(window)][near] * weight)
    return pasted


def changes(made: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Where a model has changed a picture: [h, w] float32, from 0, as it was, to 1.

    Args:
      made: what it made, [h, w, 3] uint8.
      reconstructed: what its autoencoder alone makes of the picture, so that what that loses does not count.
    """
    first, second = (np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(1)), np.float32)  # no speckle
                     for one in (made, reconstructed))
    low, high = CHANGED
    rise = np.clip((np.sqrt(np.square(first - second).mean(-1)) - low) / (high - low), 0, 1)
    return rise**2 * (3 - 2 * rise)


def blend(picture: np.ndarray, placed: np.ndarray, mask: np.ndarray | None, window: Crop, weight: np.ndarray
          ) -> np.ndarray:
    """`placed` inside the mask [h, w] (> 127; None: everywhere), by the weight [a, b] in 0 to 1 of the window as it was
    worked on; the picture elsewhere. The mask's edge is soft over a pixel alone: what is painted may touch it.
    """
    pasted, seen = picture.copy(), _seen(window)
    shown = np.repeat(np.rint(255 * weight).astype(np.uint8)[..., None], 3, -1)
    share = _enlarged(shown, window, picture.shape[:2])[..., 0]
    edge = np.ones_like(share) if mask is None else _weight(mask[seen] > 127, 0.5)
    part, new = pasted[seen], placed[seen]
    for start in range(0, len(part), STRIP):
        rows = slice(start, start + STRIP)
        weight = (share[rows] / np.float32(255) * edge[rows])[..., None]
        part[rows] = np.rint(part[rows] * (1 - weight) + new[rows] * weight)
    return pasted


def _enlarged(result: np.ndarray, window: Crop, size: Size) -> np.ndarray:
    """What lies inside a picture of `size` (height, width) of a result [a, b, 3] that fills the window."""
    big = resize.antialiased(result, (window.height, window.width))
    return big[max(0, -window.top):size[0] - window.top, max(0, -window.left):size[1] - window.left]


def _weight(inside: np.ndarray, radius: float) -> np.ndarray:
    """[h, w] float32: 0 outside, and rising from the edge to 1. Each radius serves where a disc of it fits in."""
    weight, left = inside.astype(np.float32), inside
    while left.any() and radius >= 0.5:
        soft = _blurred(inside, radius)
        wide = _blurred(soft > 0.84, radius) > 0.03  # a straight edge's 0.84 is one radius inside: there and around
        weight = np.where(left & wide, np.clip(2 * soft - 1, 0, 1) ** 0.5, weight)
        left, radius = left & ~wide, radius / 2
    return weight


def _blurred(inside: np.ndarray, radius: float) -> np.ndarray:
    """A bool array [h, w] as float32, 0 to 1."""
    soft = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(soft, np.float32) / 255


def drift(picture: np.ndarray, placed: np.ndarray, mask: np.ndarray, window: Crop) -> float | None:
    """How far the model moved what it should have kept: mean |difference| (of 255) outside the mask in the window.

    None where nothing in the window was to be kept.
    """
    seen = _seen(window)
    kept = mask[seen] <= 127
    if not kept.any():
        return None
    return float(np.abs(picture[seen][kept].astype(np.int16) - placed[seen][kept]).mean())


def _seen(window: Crop) -> tuple[slice, slice]:
    """The window's part inside the picture."""
    return np.s_[max(0, window.top):window.top + window.height, max(0, window.left):window.left + window.width]
