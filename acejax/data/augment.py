"""What is drawn anew for a sample each time: height of its references, its mask, whether its prompt is dropped."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from acejax.data.layout import Size
from acejax.errors import UserError

OWN, FULL, RANDOM = "own", "full", "random"


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Shares of the samples.

    Attributes:
      drop_caption: whose prompt is left out, for guidance without a prompt.
      full_mask: whose mask becomes white everywhere.
      random_mask: whose mask gets random shapes beside its own white; without a mask of its own only where the picture
        to edit is the target itself, as elsewhere the mask must hold all that changes.
    """

    drop_caption: float = 0.0
    full_mask: float = 0.0
    random_mask: float = 0.0

    def __post_init__(self):
        for field, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise UserError(f"augment.{field} is {value!r}; expected a share, 0 to 1")
        if self.full_mask + self.random_mask > 1:
            raise UserError(f"augment.full_mask and random_mask are {self.full_mask} and {self.random_mask}; expected "
                            "at most 1 together")

    def mask(self, rng: np.random.Generator) -> str:
        """Which mask a sample gets: OWN, FULL or RANDOM."""
        x = rng.random()
        return FULL if x < self.full_mask else RANDOM if x < self.full_mask + self.random_mask else OWN


def random_mask(size: Size, seed: int) -> np.ndarray:
    """A mask [h, w] uint8 of one to four boxes, ellipses and brush strokes, each up to half as long as the sides."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", size[::-1])
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 5)):
        extent = rng.uniform(0.15, 0.5, 2) * size
        top, left = rng.uniform(0, 1, 2) * (size - extent)
        box = [left, top, left + extent[1], top + extent[0]]
        match rng.integers(3):
            case 0:
                pen.rectangle(box, fill=255)
            case 1:
                pen.ellipse(box, fill=255)
            case 2:
                corners = rng.uniform(0, 1, (rng.integers(2, 6), 2)) * extent[::-1] + (left, top)
                pen.line([tuple(corner) for corner in corners], 255, max(1, round(min(extent) / 3)), "curve")
    return np.asarray(image)
