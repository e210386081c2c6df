"""A sample as a canvas: planned from the headers of its pictures, then made from their pixels."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from acejax.data import canvas, pictures, resize
from acejax.data.augment import FULL, OWN, RANDOM, AugmentConfig, random_mask
from acejax.data.canvas import Canvas
from acejax.data.layout import CanvasConfig, Layout, Size, lay, visible
from acejax.data.resize import Picture
from acejax.data.sample import Sample


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sample becomes in one visit.

    Attributes:
      layout: where its pictures lie.
      mask, mask_seed: which mask it gets (`acejax.data.augment`).
      drop: whether its prompt is left out.
    """

    layout: Layout
    mask: str = OWN
    mask_seed: int = 0
    drop: bool = False


def plan(sample: Sample, config: CanvasConfig, augment: AugmentConfig, rng: np.random.Generator) -> Plan:
    """Draw what is random and lay the canvas out; nothing is decoded.

    Raises:
      UserError: a picture whose header can't be read, or a mask of another size than its image.
    """
    if sample.image is not None and sample.mask is not None:
        pictures.check_mask(pictures.size(sample.mask, f"mask of {sample.name}"),
                            pictures.size(sample.image, f"image of {sample.name}"), f"of {sample.name}")
    target = pictures.size(sample.target, f"target of {sample.name}")
    references = [pictures.size(reference, f"reference {number} of {sample.name}")
                  for number, reference in enumerate(sample.references, 1)]
    layout = lay(config, target, references, [share(config, target, rng) for _ in references])
    return visit(sample, layout, augment, rng)


def visit(sample: Sample, layout: Layout, augment: AugmentConfig, rng: np.random.Generator) -> Plan:
    """What is drawn anew where the layout is known; no header is read."""
    kind, seed, drop = augment.mask(rng), int(rng.integers(2**32)), rng.random() < augment.drop_caption
    if sample.image is None or sample.mask is None and (kind == FULL or sample.image != sample.target):
        kind = OWN  # it is white everywhere, or must be
    return Plan(layout, kind, seed if kind == RANDOM else 0, bool(drop))


def compose(sample: Sample, config: CanvasConfig, plan: Plan) -> Canvas:
    """Decode a sample's pictures, no bigger than needed, and lay them out.

    Raises:
      UserError: a picture that can't be decoded.
    """
    layout = plan.layout
    size = layout.height, layout.target_width

    def decode(data: bytes, name: str, unit: Size) -> Picture:
        name = f"{name} of {sample.name}"
        return pictures.decode(data, name) if config.parity else pictures.picture(data, name, _least(unit))

    target = decode(sample.target, "target", size)
    image = target if sample.image == sample.target else None
    if image is None and sample.image is not None:
        image = decode(sample.image, "image", size)
    references = [decode(reference, f"reference {number}", (content, unit)) for number, (reference, content, unit)
                  in enumerate(zip(sample.references, layout.contents, layout.widths, strict=False), 1)]
    return canvas.training(config, layout, sample.task, target, image, _mask(sample, config, plan, image), references)


def share(config: CanvasConfig, target: Size, rng: np.random.Generator) -> float:
    """A reference's height as a share of the canvas'; in parity whole pixels of the target's height."""
    if config.parity:
        return int(rng.integers(int(target[0] / 3), target[0], endpoint=True)) / target[0]
    return float(rng.uniform(*config.reference_height))


def _mask(sample: Sample, config: CanvasConfig, plan: Plan, image: Picture | None) -> Picture | None:
    if image is None or plan.mask == FULL:
        return None
    size, own = resize.shape(image), None
    if sample.mask is not None:
        name = f"mask of {sample.name}"
        own = (pictures.decode_mask(sample.mask, name) if config.parity
               else pictures.grey(sample.mask, name, _least(size)))
    if plan.mask == RANDOM:
        drawn = random_mask(size if own is None else resize.shape(own), plan.mask_seed)
        return drawn if own is None else np.maximum(own, drawn)
    return own


def _least(unit: Size) -> Callable[[Size], Size]:
    """How big a picture of a size must be decoded so that what is seen of it need not be enlarged to fill its unit."""
    def least(size: Size) -> Size:
        seen = visible(size)[2:]
        return tuple(math.ceil(side * wanted / part) for side, wanted, part in zip(size, unit, seen, strict=True))
    return least
