"""Annotators: what a task shows the model inside the mask in place of the picture, such as edges, grey or depth.

Sources: ACE_plus `inference/utils.py` (the composite) and scepter `modules/annotator` (its parameters); blur and low
resolution are ours. `parity="reference"` gives theirs to the pixel, with OpenCV, quirks included.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from acejax.data import resize
from acejax.edit import annotator_models
from acejax.errors import UserError

CANNY = 100, 200  # the two thresholds of the gradient, of 8-bit colours
MOSAIC_CELL = 64  # pixels
BLUR = 1 / 128  # standard deviation of the blur as a share of the short side
LOW_RESOLUTION = 4  # times fewer pixels a side
DEPTH_SIDE, DEPTH_STEP = 1024, 64  # the short side at most, and what both are multiples of


def annotate(name: str, picture: np.ndarray, *, weights: str | os.PathLike | None = None,
             parity: str | None = None) -> np.ndarray:
    """What an annotator makes of a picture [h, w, 3] uint8: the same size, [h, w, 3] uint8.

    Args:
      name: one of `NAMES`.
        grey: luma (ITU-R 601).
        mosaic: cells of about 64 pixels, at least one a side.
        canny: edges, white on black; needs OpenCV.
        blur: Gaussian, with a standard deviation of 1/128 of the short side, at least one pixel.
        low_resolution: what a quarter of the pixels a side keeps.
        contour: a line drawing, dark on white, by a network that needs 3 GB of memory for a megapixel.
        depth: near is white; by a network, min to max of the picture.
        none: the picture.
      weights: contour: informative-drawings' generator, a safetensors file or PyTorch's. Depth: a folder with a DPT
        such as Intel/dpt-hybrid-midas. They stay loaded for the next picture.
      parity: "reference" for the released code's pixels: grey with the weights of red and blue exchanged, OpenCV's
        resizing in mosaic and depth.

    Raises:
      UserError: an unknown name or parity, weights that are missing, unread or of no use, or a library not installed.
    """
    reference = _is_reference(parity)
    if name not in NAMES:
        raise UserError(f"annotator {name!r} is unknown; known: {', '.join(NAMES)}")
    if (weights is None) == (name in _MODELS):
        raise UserError(f"annotator {name}: expected weights={_MODELS[name][1]}, or a ready map of the picture"
                        if weights is None else f"annotator {name} takes no weights; found {weights}")
    make = _PLAIN[name] if weights is None else functools.partial(_MODELS[name][0], weights)
    made = make(picture, reference)
    return made if made.ndim == 3 else np.repeat(made[..., None], 3, axis=2)


def annotator(weights: Mapping[str, str | os.PathLike] | None = None, parity: str | None = None
              ) -> Callable[[str, np.ndarray], np.ndarray]:
    """`annotate` with the networks' weights by name (contour, depth) and the parity that are at hand."""
    return lambda name, picture: annotate(name, picture, weights=(weights or {}).get(name), parity=parity)


def inside(annotated: np.ndarray, picture: np.ndarray, mask: np.ndarray | None, *,
           parity: str | None = None) -> np.ndarray:
    """The annotated picture inside the mask, the picture outside, [h, w, 3] uint8.

    The mask [h, w] uint8 is binarised at half, and none or an empty one is everywhere. With parity="reference" its
    grey values blend, and an empty one is nowhere.
    """
    if not _is_reference(parity) and mask is not None:
        mask = np.where(mask > 127, 255, 0).astype(np.uint8) if (mask > 127).any() else None
    if mask is None:
        return annotated
    return np.asarray(Image.composite(*map(Image.fromarray, (annotated, picture, mask))))


def _grey(picture: np.ndarray, reference: bool) -> np.ndarray:
    if reference:
        cv2 = _opencv("grey with parity")
        return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)  # the quirk: the picture is RGB
    return np.asarray(Image.fromarray(picture).convert("L"))


def _mosaic(picture: np.ndarray, reference: bool) -> np.ndarray:
    height, width = picture.shape[:2]
    cells = max(1, width // MOSAIC_CELL), max(1, height // MOSAIC_CELL)
    if reference:
        cv2 = _opencv("mosaic with parity")
        return cv2.resize(cv2.resize(picture, cells, interpolation=cv2.INTER_CUBIC), (width, height),
                          interpolation=cv2.INTER_NEAREST)
    small = Image.fromarray(picture).resize(cells, Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def _canny(picture: np.ndarray, reference: bool) -> np.ndarray:
    return _opencv("canny").Canny(picture, *CANNY)


def _blur(picture: np.ndarray, reference: bool) -> np.ndarray:
    deviation = max(1, min(picture.shape[:2]) * BLUR)
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(deviation)))


def _low_resolution(picture: np.ndarray, reference: bool) -> np.ndarray:
    size = picture.shape[:2]
    small = resize.antialiased(picture, tuple(max(1, round(side / LOW_RESOLUTION)) for side in size))
    return resize.antialiased(small, size)


def _contour(weights: str | os.PathLike, picture: np.ndarray, reference: bool) -> np.ndarray:
    """Whole multiples of 4 pixels are drawn: other sizes would come out larger, as they do in the released code."""
    height, width = picture.shape[:2]
    spare = [(0, max(8, -(-side // 4) * 4) - side) for side in (height, width)]
    drawn = annotator_models.contour(weights, np.pad(picture, (*spare, (0, 0)), "edge").astype(np.float32) / 255)
    return (drawn[:height, :width] * 255).astype(np.uint8)


def _depth(weights: str | os.PathLike, picture: np.ndarray, reference: bool) -> np.ndarray:
    size = picture.shape[:2]
    scale = min(1, DEPTH_SIDE / min(size))
    steps = [max(1, round(side * scale / DEPTH_STEP)) for side in size]

    def resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if not reference:
            return resize.antialiased(array, size)
        cv2 = _opencv("depth with parity")
        return cv2.resize(array, size[::-1], interpolation=cv2.INTER_AREA)

    seen = resized(picture, (steps[0] * DEPTH_STEP, steps[1] * DEPTH_STEP))
    near = annotator_models.depth(weights, seen.astype(np.float32) / 127.5 - 1)
    near -= near.min()
    near /= max(near.max(), np.finfo(np.float32).tiny)  # a flat depth is black
    return resized((near * 255).astype(np.uint8), size)


_PLAIN = {"none": lambda picture, reference: picture, "grey": _grey, "mosaic": _mosaic, "canny": _canny, "blur": _blur,
          "low_resolution": _low_resolution}
_MODELS = {"contour": (_contour, "FILE of informative-drawings' generator"),
           "depth": (_depth, "FOLDER of a DPT such as Intel/dpt-hybrid-midas")}
NAMES = (*_PLAIN, *_MODELS)


def _is_reference(parity: str | None) -> bool:
    if parity not in (None, "reference"):
        raise UserError(f"parity is {parity!r}; expected None or 'reference'")
    return parity is not None


def _opencv(user: str) -> Any:
    try:
        import cv2
    except ImportError:
        raise UserError(f"{user} needs OpenCV: pip install acejax[annotators]") from None
    return cv2
