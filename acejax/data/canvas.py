"""The one place where pictures become a canvas: references, then the target, side by side (paper section 3).

Pictures are [h, w, 3] and masks [h, w] uint8 (255 = generate); canvases are float32, pictures in [-1, 1] with 0 = grey
and masks [h, w, 1] in [0, 1]. Source: ACE_plus `modules/ace_plus_dataset.py`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from acejax.errors import UserError

TOKEN = 16  # pixels along one side of a token


@dataclasses.dataclass(frozen=True)
class Canvas:
    """One sample, units side by side.

    Attributes:
      edit: [h, W, 3] what is kept: the references, and the picture outside its mask.
      modify: [h, W, 3] what is to be changed: the picture inside its mask, times 1 - repainting scale.
      mask: [h, W, 1], 1 = generate.
      target: [h, W, 3] references and target, or None when editing.
      widths: width of each unit in pixels, the target last.
    """

    edit: np.ndarray
    modify: np.ndarray
    mask: np.ndarray
    target: np.ndarray | None
    widths: tuple[int, ...]


def compose(size: tuple[int, int], image: np.ndarray | None = None, mask: np.ndarray | None = None,
            references: Sequence[np.ndarray] = (), target: np.ndarray | None = None, scale: float = 1.0) -> Canvas:
    """Lay references and the picture to edit on one canvas.

    Args:
      size: height and width of the target unit, multiples of 16; every unit has this height.
      image: the picture to edit, or None (grey, everything is generated).
      mask: where to generate, or None for everywhere; binarised at half.
      references: pictures of the same height, widths multiples of 16.
      target: the wanted picture, in training.
      scale: repainting scale: how much of the picture inside the mask is hidden from the model (1 = all).

    Raises:
      UserError: a picture of another size, or sizes that are no multiples of 16.
    """
    _check("target", (*size, 3), size)
    for name, array in (("picture", image), ("mask", mask), ("target", target)):
        if array is not None:
            _check(name, array.shape, size)
    for number, reference in enumerate(references, 1):
        _check(f"reference {number}", reference.shape, (size[0], reference.shape[1]))
    generate = np.ones((*size, 1), np.float32) if image is None or mask is None else (
        mask[..., None] > 127).astype(np.float32)
    content = np.zeros((*size, 3), np.float32) if image is None else normalize(image) * (1 - scale * generate)
    shown = [normalize(reference) for reference in references]
    none = [np.zeros_like(reference) for reference in shown]
    return Canvas(edit=_beside([*shown, content * (1 - generate)]),
                  modify=_beside([*none, content * generate]),
                  mask=_beside([*(blank[..., :1] for blank in none), generate]),
                  target=None if target is None else _beside([*shown, normalize(target)]),
                  widths=(*(reference.shape[1] for reference in references), size[1]))


def normalize(picture: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return picture.astype(np.float32) / 127.5 - 1


def denormalize(picture: np.ndarray) -> np.ndarray:
    """float [-1, 1] -> uint8, clamped."""
    return np.rint(np.clip((np.asarray(picture, np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)


def _beside(units: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(units, axis=1)


def _check(name: str, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if tuple(shape[:2]) != tuple(size) or size[0] % TOKEN or size[1] % TOKEN:
        raise UserError(f"{name} is {shape[0]} x {shape[1]} pixels (height x width); expected {size[0]} x {size[1]}, "
                        f"multiples of {TOKEN}")
