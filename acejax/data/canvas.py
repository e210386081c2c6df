"""The one place where pictures become model input, for training and for editing: references, then the target.

A canvas is kept as bytes; `contents` makes the numbers that the autoencoder sees, [-1, 1] with 0 = grey. Pictures are
[h, w, 3] and masks [h, w] uint8 (255 = generate). Sources: ACE_plus `modules/ace_plus_dataset.py` (training) and
`inference/utils.py` (editing); `acejax.data.released` is what they do, this is what they should.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from acejax.data import released, resize
from acejax.data.layout import CanvasConfig, Layout, Size, lay_editing, visible
from acejax.data.resize import Picture
from acejax.errors import UserError

ROWS = 32


@dataclasses.dataclass(frozen=True)
class Canvas:
    """One sample, units side by side.

    Attributes:
      source: [h, W, 3] the references and the picture to edit (uint8; float32 of 0 to 255 where parity asks for it).
      present: [h, W] bool, where the source shows a picture; elsewhere it counts as grey.
      mask: [h, W] uint8, 255 = generate.
      target: [h, W, 3] the references and the target, or None when editing.
      widths: of the units in pixels, the target last.
      scale: repainting scale, how much of the source inside the mask is hidden (1 = all).
      split: whether what is to be changed stands apart from what is kept.
      joined: whether the canvas is encoded as one picture (parity), and not unit by unit.
    """

    source: np.ndarray
    present: np.ndarray
    mask: np.ndarray
    target: np.ndarray | None
    widths: tuple[int, ...]
    scale: float
    split: bool
    joined: bool = False


class Contents(NamedTuple):
    """What is encoded, float32 [h, W, 3] in [-1, 1]; `modify` only where split, `target` only in training.

    `edit` is what is kept, `modify` what is to be changed; `mask` [h, W, 1] is in [0, 1].
    """

    edit: np.ndarray
    modify: np.ndarray | None
    mask: np.ndarray
    target: np.ndarray | None


def training(config: CanvasConfig, layout: Layout, task: str, target: Picture, image: Picture | None = None,
             mask: Picture | None = None, references: Sequence[Picture] = ()) -> Canvas:
    """The canvas of a sample whose `layout` comes from the pictures' sizes.

    The pictures, arrays or Pillow's own, may be decoded smaller than their files say (with parity they are arrays and
    may not). An image that is the very object `target` is resized once. Without an image everything is
    generated from grey, and a mask is discarded; an image without a mask, or with an empty one, is changed everywhere.
    """
    scale = config.scale_of(task, len(references))
    if config.parity:
        parts = released.training(layout, scale, target, image, mask, references)
        return Canvas(*parts, layout.widths, scale, config.split, joined=True)
    size = layout.height, layout.target_width
    wanted = _seen(target, size)
    kept = wanted if image is target else None if image is None else _seen(image, size)
    canvas = _compose(config, layout, kept, mask, references, scale)
    return dataclasses.replace(canvas, target=_beside(canvas.source[:, :-size[1]], wanted))


def editing(config: CanvasConfig, image: np.ndarray | None = None, mask: np.ndarray | None = None,
            references: Sequence[np.ndarray] = (), size: Size | None = None, scale: float = 1.0) -> Canvas:
    """The canvas of an edit.

    Args:
      image: the picture to edit, or None (grey; everything is generated).
      mask: of the image's size, where to generate, binarised at half; None or empty is everywhere.
      references: pictures of any size.
      size: height and width of the result where there is no image.
      scale: repainting scale.

    Raises:
      UserError: neither image nor size, both and different, or a mask of another size than its image.
    """
    if image is None and size is None or image is not None and size not in (None, image.shape[:2]):
        raise UserError(f"found {'no' if image is None else 'a'} picture to edit and size {size}; expected one of them")
    size = image.shape[:2] if size is None else size
    if image is not None and mask is not None and mask.shape != size:
        raise UserError(f"the mask is {mask.shape[0]} x {mask.shape[1]} pixels (height x width); its picture is "
                        f"{size[0]} x {size[1]}")
    if config.parity:
        *parts, widths = released.editing(config, image, mask, references, size, scale)
        return Canvas(*parts, None, widths, scale, config.split, joined=True)
    layout = lay_editing(config, size, [reference.shape[:2] for reference in references])
    kept = None if image is None else _seen(image, (layout.height, layout.target_width))
    return _compose(config, layout, kept, mask, references, scale)


def contents(canvas: Canvas) -> Contents:
    """What the autoencoder sees."""
    mask = canvas.mask[..., None].astype(np.float32) / 255
    shown = canvas.present
    if not canvas.joined:  # there the target is present already, and a reference reaches beyond its unit
        shown = shown.copy()
        shown[:, -canvas.widths[-1]:] = True
    edit = np.empty((*canvas.mask.shape, 3), np.float32)
    modify = np.empty_like(edit) if canvas.split else None
    target = None if canvas.target is None else np.empty_like(edit)
    scratch = np.empty((2, ROWS, *edit.shape[1:]), np.float32)
    for top in range(0, len(edit), ROWS):  # numbers of so few rows stay in the processor's cache
        rows = np.s_[top:top + ROWS]
        part, weight = scratch[:, :len(edit[rows])]
        for channel in range(3):
            part[..., channel] = mask[rows, :, 0]
        np.multiply(part, float(canvas.scale), out=weight)
        np.subtract(1, weight, out=weight)
        content = edit[rows]
        _normalize_into(content, canvas.source[rows], canvas.present[rows])
        content *= weight
        if modify is not None:
            np.multiply(content, part, out=modify[rows])
            content *= np.subtract(1, part, out=part)
        if target is not None:
            _normalize_into(target[rows], canvas.target[rows], shown[rows])
    return Contents(edit, modify, mask, target)


def normalize(picture: np.ndarray) -> np.ndarray:
    """[0, 255] -> float32 [-1, 1]."""
    made = np.empty(picture.shape, np.float32)
    _normalize_into(made, picture)
    return made


def denormalize(picture: np.ndarray) -> np.ndarray:
    """float [-1, 1] -> uint8, clamped."""
    return np.rint(np.clip((np.asarray(picture, np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)


def _normalize_into(out: np.ndarray, picture: np.ndarray, present: np.ndarray | None = None) -> None:
    """`normalize`, and 0 where it is not present."""
    np.copyto(out, picture, casting="same_kind")
    out /= 127.5
    out -= 1
    if present is not None and not present.all():
        for channel in range(3):
            out[..., channel] *= present


def _compose(config: CanvasConfig, layout: Layout, kept: np.ndarray | None, mask: Picture | None,
             references: Sequence[Picture], scale: float) -> Canvas:
    """`kept` is the picture to edit as large as its unit."""
    size = layout.height, layout.target_width
    left = sum(layout.widths) - size[1]
    shown = np.zeros((size[0], left, 3), np.uint8)
    present = np.zeros((size[0], left + size[1]), bool)
    start = 0
    for reference, unit, content in zip(references, layout.widths, layout.contents, strict=False):
        top = (size[0] - content) // 2
        place = np.s_[top:top + content, start:start + unit]
        shown[place] = _seen(reference, (content, unit))
        present[place] = True
        start += unit
    generate = None
    if kept is not None:
        present[:, left:] = True
        if mask is not None:
            generate = resize.mask(mask, size, visible(resize.shape(mask)))
    if generate is None or not generate.any():
        generate = np.full(size, 255, np.uint8)
    source = _beside(shown, np.zeros((*size, 3), np.uint8) if kept is None else kept)
    return Canvas(source, present, _beside(np.zeros((size[0], left), np.uint8), generate), None, layout.widths, scale,
                  config.split)


def _seen(picture: Picture, size: Size) -> np.ndarray:
    return resize.antialiased(picture, size, visible(resize.shape(picture)))


def _beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Joined along the width; without references there is nothing to copy."""
    return np.concatenate([left, right], 1) if left.shape[1] else right
