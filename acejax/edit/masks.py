"""Masks as they are given become masks that are worked with: black and white, and larger where that is asked for."""

import numpy as np


def binary(mask: np.ndarray) -> np.ndarray:
    """[h, w] uint8: 255 where a mask is lighter than half (> 127), else 0."""
    return np.where(mask > 127, 255, 0).astype(np.uint8)


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask [h, w] uint8, grey or not, that reaches so many pixels further to all sides and into all corners."""
    for axis in (0, 1):
        mask, reach = np.moveaxis(mask, axis, 0), 0
        while reach < pixels:
            step = min(reach + 1, pixels - reach)  # further, the copies would not touch at an edge of the picture
            larger = mask.copy()
            np.maximum(larger[step:], mask[:-step], out=larger[step:])
            np.maximum(larger[:-step], mask[step:], out=larger[:-step])
            mask, reach = larger, reach + step
        mask = np.moveaxis(mask, 0, axis)
    return mask
