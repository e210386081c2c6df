"""What the released code does to pictures, stated a second time and apart from acejax.data.

From a description of it in words, in float64 and without haste: normalise, multiply, nearest-exact, pad, join, budget,
resize, split. Sources: ACE_plus `modules/ace_plus_dataset.py` (training) and `inference/utils.py` (editing). Pictures
come as uint8 [h, w, 3], masks as uint8 [h, w].
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Item(NamedTuple):
    """What goes to the autoencoder, [h, W, 3] and mask [h, W, 1]; `seam` is `slice_w` (0 without a reference)."""

    edit: np.ndarray
    modify: np.ndarray | None
    mask: np.ndarray
    target: np.ndarray | None
    seam: int | None = None


def normalise(picture: np.ndarray) -> np.ndarray:
    return (picture.astype(np.float64) / 255 - 0.5) / 0.5


def nearest_exact(array: np.ndarray, height: int, width: int) -> np.ndarray:
    return array[indices(array.shape[0], height)][:, indices(array.shape[1], width)]


def indices(length: int, wanted: int) -> list[int]:
    """floor((i + 0.5) length / wanted), with a quotient in float32: of two pixels just as near, rounding takes one."""
    step = float(np.float32(length / wanted))
    source = [np.float32((i + 0.5) * step - 0.5) + np.float32(0.5) for i in range(wanted)]
    return [min(max(math.floor(x), 0), length - 1) for x in source]


def triangle(length: int, wanted: int) -> np.ndarray:
    """Weights [wanted, length] of bilinear antialiased resizing: a triangle as wide as the step between pixels.

    The step and the pixels' middles are float32, as `indices` has them.
    """
    step, half = np.float32(length / wanted), np.float32(0.5)
    reach = max(step, np.float32(1))
    weights = np.zeros((wanted, length))
    for i in range(wanted):
        centre = np.float32(i + 0.5) * step
        for j in range(max(0, int(centre - reach + half)), min(length, int(centre + reach + half))):
            weights[i, j] = max(0, 1 - abs(j + 0.5 - float(centre)) / float(reach))
        weights[i] /= weights[i].sum()
    return weights


def bilinear(array: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.einsum("ih,hwc,jw->ijc", triangle(array.shape[0], height), array, triangle(array.shape[1], width),
                     optimize=True)


def pad(array: np.ndarray, height: int) -> np.ndarray:
    """Zeros above and below; the odd row below."""
    above = (height - array.shape[0]) // 2
    padded = np.zeros((height, *array.shape[1:]))
    padded[above:above + array.shape[0]] = array
    return padded


def ratio(height: int, width: int, max_tokens: int) -> float:
    return min(1, math.sqrt(max_tokens / ((height / 16) * (width / 16))))


def budget(height: int, width: int, max_tokens: int) -> tuple[int, int]:
    k = ratio(height, width, max_tokens)
    return int(height * k) // 16 * 16, int(width * k) // 16 * 16


def split(canvas: np.ndarray, mask: np.ndarray, wanted: bool) -> tuple[np.ndarray, np.ndarray | None]:
    return (canvas * (1 - mask), canvas * mask) if wanted else (canvas, None)


def training(target: np.ndarray, image: np.ndarray | None = None, mask: np.ndarray | None = None,
             references: Sequence[np.ndarray] = (), reference_heights: Sequence[int] = (), max_tokens: int = 2048,
             repainting_scale: float = 0.5, modify_mode: bool = True) -> Item:
    """A training item; `reference_heights` are drawn of int(H / 3) to H. There is one reference at most there."""
    height, width = target.shape[:2]
    if image is None:
        image, mask = np.full_like(target, 255), np.full(target.shape[:2], 255, np.uint8)
    if mask is None:
        mask = np.full(image.shape[:2], 255, np.uint8)
    edit, edit_mask, wanted = normalise(image), mask[..., None] / 255, normalise(target)
    scale = 1.0 if references else repainting_scale
    edit = edit * (1 - scale * edit_mask)

    source, source_mask = nearest_exact(edit, height, width), nearest_exact(edit_mask, height, width)
    for reference, tall in reversed(list(zip(references, reference_heights, strict=True))):
        wide = int(reference.shape[1] * (tall / reference.shape[0]))
        shown = pad(nearest_exact(normalise(reference), tall, wide), height)
        source = np.concatenate([shown, source], axis=1)
        wanted = np.concatenate([shown, wanted], axis=1)
        source_mask = np.concatenate([np.zeros((height, wide, 1)), source_mask], axis=1)

    size = budget(*source.shape[:2], max_tokens)
    source, source_mask, wanted = (nearest_exact(array, *size) for array in (source, source_mask, wanted))
    return Item(*split(source, source_mask, modify_mode), source_mask, wanted)


def crop(picture: np.ndarray) -> np.ndarray:
    """`image_check`: the middle of a picture beyond 4:1, as torchvision's CenterCrop finds it."""
    height, width = picture.shape[:2]
    if height / width > 4:
        top = round((height - 4 * width) / 2)
        return picture[top:top + 4 * width]
    if width / height > 4:
        left = round((width - 4 * height) / 2)
        return picture[:, left:left + 4 * height]
    return picture


def editing(image: np.ndarray | None = None, mask: np.ndarray | None = None, references: Sequence[np.ndarray] = (),
            size: tuple[int, int] | None = None, scale: float = 1.0, max_tokens: int = 4096,
            keep_pixels: bool = True, keep_pixels_rate: float = 0.8, use_change: bool = True) -> Item:
    """What is made of an edit's pictures."""
    if image is None:
        edit, edit_mask = np.zeros((*size, 3)), np.ones((*size, 1))
    else:
        edit = normalise(crop(image))
        edit_mask = np.ones((*edit.shape[:2], 1)) if mask is None else (mask[..., None] > 128).astype(np.float64)
        if not edit_mask.any():
            edit_mask[:] = 1
    edit = edit * (1 - edit_mask * scale)

    height, seam = edit.shape[0], 0
    for reference in reversed(references):
        shown = normalise(crop(reference))
        tall, wide = shown.shape[:2]
        if not keep_pixels:
            shown = bilinear(shown, height, int(wide * (height / tall)))
        elif tall >= keep_pixels_rate * height:
            content = int(height * keep_pixels_rate)
            shown = bilinear(shown, content, int(wide * (content / tall)))
        seam += shown.shape[1]
        edit = np.concatenate([pad(shown, height), edit], axis=1)
        edit_mask = np.concatenate([np.zeros((height, shown.shape[1], 1)), edit_mask], axis=1)

    k, size = ratio(*edit.shape[:2], max_tokens), budget(*edit.shape[:2], max_tokens)
    edit, edit_mask = nearest_exact(edit, *size), nearest_exact(edit_mask, *size)
    return Item(*split(edit, edit_mask, use_change), edit_mask, None, int(seam * k) // 16 * 16)
