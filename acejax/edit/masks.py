"""Masks as they are given become masks that are worked with: black and white, and larger where that is asked for."""

import numpy as np


def binary(mask: np.ndarray) -> np.ndarray:
    """[h, w] uint8: 255 where a mask is lighter than half (> 127), else 0."""
    return np.where(mask > 127, 255, 0).astype(np.uint8)


def square(mask: np.ndarray) -> np.ndarray:
    """The largest square in the middle of a mask's bounding box; mask [h, w] with > 127 = inside somewhere.

    The mask itself where that square is not its own for the most part: an arc, spots far apart.
    """
    rows, columns = (np.flatnonzero((mask > 127).any(axis)) for axis in (1, 0))
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    side = min(height, width)
    top, left = rows[0] + (height - side) // 2, columns[0] + (width - side) // 2
    found = np.zeros_like(mask)
    found[top:top + side, left:left + side] = 255
    return found if np.mean(mask[top:top + side, left:left + side] > 127) > 0.5 else mask


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask [h, w] uint8, grey or not, that reaches so many pixels further to all sides and into all corners."""
    for axis in (0, 1):
        reach = min(pixels, mask.shape[axis])
        wide = np.moveaxis(np.pad(mask, [(reach, reach) if side == axis else (0, 0) for side in (0, 1)]), axis, 0)
        seen = 1  # pixels that each one is the greatest of
        while seen < 2 * reach + 1:
            step = min(seen, 2 * reach + 1 - seen)
            wide, seen = np.maximum(wide[:-step], wide[step:]), seen + step
        mask = np.moveaxis(wide, 0, axis)
    return mask
