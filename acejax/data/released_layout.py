"""The sizes that ACE++'s released code gives a canvas: the budget is of the whole, the seam is on no 16-pixel line.

Sources: ACE_plus `modules/ace_plus_dataset.py` and `inference/utils.py`. Sizes are (height, width) in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np

TOKEN = 16
Size = tuple[int, int]


def fit(max_tokens: int, size: Size, seam: int) -> tuple[Size, int]:
    """The canvas within the budget, and where its last reference ends, both down to multiples of 16.

    A side of less than 16 pixels, which the released code would lose, stays at 16.
    """
    k = min(1, math.sqrt(max_tokens / (size[0] / TOKEN * (size[1] / TOKEN))))
    return (max(TOKEN, _down(size[0] * k)), max(TOKEN, _down(size[1] * k))), _down(seam * k)


def units(size: Size, seam: int, widths: Sequence[int]) -> tuple[int, ...]:
    """Widths of the units on the canvas; of several references by share, down to multiples of 16."""
    seams = [_down(seam * end / sum(widths)) for end in np.cumsum(widths[:-1])] + [seam] * bool(len(widths))
    return tuple(int(width) for width in np.diff([0, *seams, size[1]]))


def reference_width(size: Size, height: int) -> int:
    """Of a reference at a height. The quotient comes first, as there: 22 pixels square at 15 are 14 wide.

    The released code fails where this is less than one pixel; here it is one.
    """
    return max(1, int(size[1] * (height / size[0])))


def _down(length: float) -> int:
    return int(length) // TOKEN * TOKEN
