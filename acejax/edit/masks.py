"""Masks as they are given become masks that are worked with: black and white, and larger where that is asked for."""

import numpy as np


def binary(mask: np.ndarray) -> np.ndarray:
    """[h, w] uint8: 255 where a mask is lighter than half (> 127), else 0."""
    return np.where(mask > 127, 255, 0).astype(np.uint8)


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
