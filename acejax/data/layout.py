"""Where pictures lie on a canvas, from their sizes alone: one height, a width for each unit, the target last.

Nothing is decoded here, so that buckets, plans and checks of a million samples cost nothing. Sizes are (height, width)
in pixels. Source: ACE_plus `modules/ace_plus_dataset.py` and `inference/utils.py`; what differs is said at each place.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from acejax.data import released_layout
from acejax.data.released_layout import TOKEN, Size  # a token is 16 x 16 pixels
from acejax.errors import UserError

ASPECT = 4  # longest side of what is seen of a picture, in shortest sides

@dataclasses.dataclass(frozen=True)
class CanvasConfig:
    """How pictures become a canvas. The defaults are those of a 448-channel model; `lora` has those of a 384 one.

    Attributes:
      max_tokens: the budget; bigger pictures are made smaller, none is enlarged. A token is 16 x 16 pixels.
      budget: "picture", each unit may have `max_tokens`; "canvas", all together (a wide reference shrinks the target).
      split: what is to be changed stands apart from what is kept (448 channels); else they are one picture (384).
      scale: repainting scale in training, how much of what is to be changed is hidden (1 = all); with references it
        is 1. `scales` comes first: by task.
      reference_height: least and greatest height of a reference as a share of the canvas', drawn in training.
      editing_height: the greatest share when editing: a smaller reference keeps its size, but is at least of
        `reference_height`'s least share.
      multiple: a unit's sides are multiples of this (a multiple of 16): 64 leaves an encoder few shapes to compile.
      parity: "reference" is the released code, with its quirks; None repairs them.
    """

    max_tokens: int = 4096
    budget: str = "picture"
    split: bool = True
    scale: float = 0.5
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reference_height: tuple[float, float] = (1 / 3, 1.0)
    editing_height: float = 0.8
    multiple: int = TOKEN
    parity: str | None = None

    def __post_init__(self):
        def need(ok: bool, field: str, expected: str) -> None:
            if not ok:
                raise UserError(f"canvas.{field} is {getattr(self, field)!r}; expected {expected}")
        need(self.multiple > 0 and self.multiple % TOKEN == 0, "multiple", f"a multiple of {TOKEN} pixels")
        need(self.max_tokens >= ASPECT * (self.multiple // TOKEN) ** 2, "max_tokens",
             f"at least {ASPECT * (self.multiple // TOKEN) ** 2}")
        need(self.budget in ("picture", "canvas"), "budget", "'picture' or 'canvas'")
        need(0 <= self.scale <= 1, "scale", "0 to 1")
        need(all(0 <= scale <= 1 for scale in self.scales.values()), "scales", "0 to 1 for each task")
        need(len(self.reference_height) == 2 and 0 < self.reference_height[0] <= self.reference_height[1] <= 1,
             "reference_height", "two shares above 0, up to 1")
        need(0 < self.editing_height <= 1, "editing_height", "a share above 0, up to 1")
        need(self.parity in (None, "reference"), "parity", "None or 'reference'")

    @classmethod
    def lora(cls, **changes) -> "CanvasConfig":
        """For 384 channels: trained as it is used, with full-height references and nothing split."""
        return cls(**{"split": False, "reference_height": (1.0, 1.0), "editing_height": 1.0} | changes)

    def scale_of(self, task: str, references: int) -> float:
        """The repainting scale of a sample in training."""
        return self.scales.get(task, 1.0 if references else self.scale)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A canvas without its pictures.

    Attributes:
      height: of the canvas, and so of every unit.
      widths: of the units: references, then the target.
      contents: height of each unit's picture (grey above and below it), the target's being `height`.
    """

    height: int
    widths: tuple[int, ...]
    contents: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.height // TOKEN * (sum(self.widths) // TOKEN)

    @property
    def target_width(self) -> int:
        return self.widths[-1]


def visible(size: Size) -> tuple[int, int, int, int]:
    """The part of a picture that is seen, (top, left, height, width): its middle, at most 4:1."""
    height, width = size
    seen_height, seen_width = min(height, ASPECT * width), min(width, ASPECT * height)
    return (height - seen_height) // 2, (width - seen_width) // 2, seen_height, seen_width


def lay(config: CanvasConfig, target: Size, references: Sequence[Size] = (), shares: Sequence[float] = ()) -> Layout:
    """The canvas of a target and its references.

    Args:
      target: size of the picture to be made (when editing, of the picture to edit).
      references: their sizes.
      shares: height of each reference as a share of the canvas'.

    Raises:
      UserError: an empty picture.
    """
    if len(shares) != len(references):
        raise ValueError(f"{len(references)} references and {len(shares)} shares")
    if any(side < 1 for size in (target, *references) for side in size):
        raise UserError(f"pictures of {[target, *references]} (height, width); expected at least one pixel")
    if config.parity:
        return _lay_released(config, target, references, shares)
    if config.budget == "canvas":
        return _lay_together(config, target, references, shares)
    (height, width), step = visible(target)[2:], config.multiple
    k = min(1.0, math.sqrt(config.max_tokens * TOKEN**2 / (height * width)))
    height, width = _floor(height * k, step), _floor(width * k, step)
    widths, contents = [], []
    for reference, share in zip(references, shares, strict=True):
        tall, wide = visible(reference)[2:]
        content = max(1, round(share * height))
        most = _floor(config.max_tokens * TOKEN**2 / height, step)
        unit = max(step, round(wide * content / tall / step) * step)
        if unit > most or unit == step:  # cut to the budget, or the narrowest there is: the height follows
            unit = min(unit, most)
            content = max(1, min(height, round(unit * tall / wide)))
        widths.append(unit)
        contents.append(content)
    return Layout(height, (*widths, width), (*contents, height))


def lay_editing(config: CanvasConfig, target: Size, references: Sequence[Size] = ()) -> Layout:
    """`lay` for an edit, which draws nothing: a reference keeps its size within the config's shares.

    Raises:
      UserError: as `lay`.
    """
    least = config.reference_height[0]
    return lay(config, target, references, [
        min(config.editing_height, max(least, visible(reference)[2] / visible(target)[2])) for reference in references])


def _lay_together(config: CanvasConfig, target: Size, references: Sequence[Size], shares: Sequence[float]) -> Layout:
    """All units share the budget. What rounding down leaves of it goes to the sides that lost most, a step each."""
    (height, width), step = visible(target)[2:], config.multiple
    wide = [seen[3] / seen[2] * share * height for seen, share in zip(map(visible, references), shares, strict=True)]
    wanted = height, *wide, width
    k = min(1.0, math.sqrt(config.max_tokens * TOKEN**2 / (height * (width + sum(wide)))))

    def fits(sides: Sequence[int]) -> bool:
        return sides[0] * sum(sides[1:]) <= config.max_tokens * TOKEN**2

    sides = [_floor(side * k, step) for side in wanted]
    while not fits(sides) and sides[0] > step:  # only where sides of one step are too much
        k *= 0.95
        sides = [_floor(side * k, step) for side in wanted]
    for i in sorted(range(len(sides)), key=lambda i: sides[i] / wanted[i]):
        longer = [*sides[:i], sides[i] + step, *sides[i + 1:]]
        if sides[i] < wanted[i] * k and longer[i] <= wanted[i] and fits(longer):
            sides = longer
    return Layout(sides[0], tuple(sides[1:]), (*(max(1, round(share * sides[0])) for share in shares), sides[0]))


def _lay_released(config: CanvasConfig, target: Size, references: Sequence[Size], shares: Sequence[float]) -> Layout:
    """`contents` are heights before the canvas is made smaller as a whole."""
    heights = [max(1, round(share * target[0])) for share in shares]
    widths = [released_layout.reference_width(*pair) for pair in zip(references, heights, strict=True)]
    size, seam = released_layout.fit(config.max_tokens, (target[0], sum(widths) + target[1]), sum(widths))
    if seam >= size[1]:
        raise UserError(f"a target of {target} (height, width) beside references of {list(references)} leaves it no "
                        "token with parity='reference'; expected narrower references")
    return Layout(size[0], released_layout.units(size, seam, widths), (*heights, target[0]))


def _floor(length: float, step: int) -> int:
    """Down to a multiple of `step`, which is the least; what is a multiple but for rounding stays."""
    return max(step, int(length + 1e-6) // step * step)
