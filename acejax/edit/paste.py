"""Putting a result back where its window was, so that every pixel outside the mask stays the picture's own."""

import numpy as np
from PIL import Image, ImageFilter

from acejax.data import resize
from acejax.edit.crop import Crop


def place(picture: np.ndarray, result: np.ndarray, window: Crop) -> np.ndarray:
    """A copy of the picture [h, w, 3] with the result [a, b, 3] in its window, as the model made it."""
    height, width = picture.shape[:2]
    placed = picture.copy()
    big = resize.antialiased(result, (window.height, window.width))
    top, left = max(0, window.top), max(0, window.left)
    bottom, right = min(height, window.top + window.height), min(width, window.left + window.width)
    placed[top:bottom, left:right] = big[top - window.top:bottom - window.top, left - window.left:right - window.left]
    return placed


def feather(picture: np.ndarray, placed: np.ndarray, mask: np.ndarray, window: Crop, radius: float) -> np.ndarray:
    """`placed` inside the mask [h, w] (> 127), the picture outside; the edge is soft inwards, over about 2 `radius`."""
    seen, pasted = _seen(window), picture.copy()
    inside = (mask[seen] > 127).astype(np.uint8) * 255
    soft = np.asarray(Image.fromarray(inside).filter(ImageFilter.GaussianBlur(radius)), np.float32)
    weight = (np.clip(soft / 127.5 - 1, 0, 1) ** 0.5 * (inside > 0))[..., None]
    pasted[seen] = np.rint(picture[seen] * (1 - weight) + placed[seen] * weight).astype(np.uint8)
    return pasted


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
