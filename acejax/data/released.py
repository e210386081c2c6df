"""What ACE++'s released code does with pictures, for parity: nearest-exact resizing, soft masks, an unaligned seam.

Sources: ACE_plus `modules/ace_plus_dataset.py` and `inference/utils.py`. Both functions return the parts of a
`acejax.data.canvas.Canvas`; several references lie side by side, where the released code knows one.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from acejax.data.layout import CanvasConfig, Layout, visible
from acejax.data.released_layout import Size, fit, reference_width, units
from acejax.data.resize import nearest
from acejax.errors import UserError

SEAM = 30  # columns that hide the seam
Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def training(layout: Layout, scale: float, target: np.ndarray, image: np.ndarray | None, mask: np.ndarray | None,
             references: Sequence[np.ndarray]) -> Parts:
    """source, present, mask, target; the mask stays soft. Without an image the source is white."""
    height, width = target.shape[:2]
    if image is None:
        image, mask = np.full_like(target, 255), None
    if mask is None:
        mask = np.full(image.shape[:2], 255, np.uint8)
    if mask.shape != image.shape[:2]:
        raise UserError(f"the mask is {mask.shape[0]} x {mask.shape[1]} pixels (height x width); its picture is "
                        f"{image.shape[0]} x {image.shape[1]}")
    shown = [nearest(picture, (content, reference_width(picture.shape[:2], content)))
             for picture, content in zip(references, layout.contents, strict=False)]
    sources = [*(_padded(picture, height) for picture in shown), nearest(image, (height, width))]
    present = [*(_padded(np.ones(picture.shape[:2], bool), height) for picture in shown),
               np.ones((height, width), bool)]
    generate = [*(np.zeros((height, picture.shape[1]), np.uint8) for picture in shown), nearest(mask, (height, width))]
    canvases = sources, present, generate, [*sources[:-1], target]
    size = layout.height, sum(layout.widths)
    return tuple(nearest(np.concatenate(canvas, 1), size) for canvas in canvases)


def editing(config: CanvasConfig, image: np.ndarray | None, mask: np.ndarray | None, references: Sequence[np.ndarray],
            size: Size, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """source, present, mask and widths. With `split` references keep their pixels where they are small enough."""
    if image is None:
        source, present, generate = np.zeros((*size, 3)), np.zeros(size, bool), np.full(size, 255, np.uint8)
    else:
        source = _at_most(image)
        generate = np.full(source.shape[:2], 255, np.uint8)
        if mask is not None and (mask > 128).any():
            generate = np.where(mask > 128, 255, 0).astype(np.uint8)
        if generate.shape != source.shape[:2]:
            raise UserError(f"the picture is {image.shape[0]} x {image.shape[1]} pixels (height x width); with a mask "
                            "parity='reference' takes pictures up to 4:1")
        present = np.ones(source.shape[:2], bool)
    height = source.shape[0]
    shown = []
    for picture in map(_at_most, references):
        wanted = height
        if config.split:
            wanted = int(height * config.editing_height)
            if picture.shape[0] < config.editing_height * height:
                shown.append(picture.astype(np.float32))
                continue
        shown.append(_bilinear(picture, (wanted, reference_width(picture.shape[:2], wanted))))
    sources = [*(_padded(picture, height) for picture in shown), source.astype(np.float32)]
    seen = [*(_padded(np.ones(picture.shape[:2], bool), height) for picture in shown), present]
    masks = [*(np.zeros((height, picture.shape[1]), np.uint8) for picture in shown), generate]
    widths = [picture.shape[1] for picture in shown]
    fitted, seam = fit(config.max_tokens, (height, sum(widths) + source.shape[1]), sum(widths))
    return (*(nearest(np.concatenate(canvas, 1), fitted) for canvas in (sources, seen, masks)),
            units(fitted, seam, widths))


def output(made: np.ndarray, seam: int, size: Size) -> np.ndarray:
    """What the released code hands out of a decoded canvas [h, W, 3] uint8 whose references end at `seam`.

    Beside a reference the first 30 columns of the target go and the rest is stretched to `size`; without one the
    canvas comes as it is, which is smaller than its picture where that was beyond the budget or off the 16-pixel grid.
    """
    if not seam:
        return made
    target = Image.fromarray(made).crop((seam + SEAM, 0, made.shape[1], made.shape[0]))
    return np.asarray(target.resize(size[::-1]))


def _padded(picture: np.ndarray, height: int) -> np.ndarray:
    """Zeros above and below."""
    top = (height - picture.shape[0]) // 2
    rows = (top, height - picture.shape[0] - top)
    return np.pad(picture, (rows, *((0, 0),) * (picture.ndim - 1)))


def _at_most(picture: np.ndarray) -> np.ndarray:
    """The middle of a picture, at most 4:1; half a pixel goes to the even side, as in torchvision's CenterCrop."""
    *_, height, width = visible(picture.shape[:2])
    top, left = round((picture.shape[0] - height) / 2), round((picture.shape[1] - width) / 2)
    return picture[top:top + height, left:left + width]


def _bilinear(picture: np.ndarray, size: Size) -> np.ndarray:
    """Antialiased, as torch resizes float32 tensors: its rounding of where a pixel lies is seen in the fifth digit."""
    resized = picture.astype(np.float32)
    for axis in (1, 0):
        first, weights = _triangles(picture.shape[axis], size[axis])
        lines, length = np.moveaxis(resized, axis, 0), picture.shape[axis]
        lines = sum(weight[:, None, None] * lines[np.minimum(first + tap, length - 1)]
                    for tap, weight in enumerate(weights.T))
        resized = np.moveaxis(lines, 0, axis)
    return resized


def _triangles(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The first source pixel of each of `wanted` pixels, and the weights [wanted, taps] float32 from there on."""
    half, one = np.float32(0.5), np.float32(1)
    step = np.float32(length) / np.float32(wanted)
    reach = max(step, one)
    middle = step * (np.arange(wanted, dtype=np.float32) + half)
    first = np.maximum(np.floor(middle - reach + half), 0).astype(np.int64)
    end = np.minimum(np.floor(middle + reach + half), length).astype(np.int64)
    taps = np.arange((end - first).max())
    place = (taps + first[:, None]).astype(np.float32) - middle[:, None] + half
    weights = np.where(taps < (end - first)[:, None], np.maximum(one - np.abs(place * (one / reach)), 0), np.float32(0))
    return first, weights / weights.sum(1, keepdims=True)
