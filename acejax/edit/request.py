"""One edit as it is asked for, and what comes of it."""

import dataclasses
import math

import numpy as np

from acejax.edit.crop import Crop
from acejax.errors import UserError

MOST_SEED = 2**32 - 1
CROPS, PASTES = ("auto", "mask", "none"), ("auto", "feather", "changed", "off")


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One edit.

    Attributes:
      prompt: the instruction.
      task: a preset's name (`acejax.edit.tasks`); None: what the inputs stand for.
      image: [h, w, 3] uint8, the picture to edit.
      mask: [h, w] uint8, > 127 = generate. With parity as in the released code: > 128, and grey blends the control map
        with the picture.
      references: pictures [., ., 3] uint8 to look at.
      control: [h, w, 3] uint8, a ready map (contours, depth, ...) of the image's size in place of the annotator.
      size: height and width of the result: where there is no image, and for outpainting and super-resolution.
      scale: repainting scale, 0 to 1; None: the task's.
      seed: fixes the result, whatever else is edited beside it.
    """

    prompt: str = ""
    task: str | None = None
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()
    control: np.ndarray | None = None
    size: tuple[int, int] | None = None
    scale: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"seed is {self.seed}; expected 0 to {MOST_SEED}")


@dataclasses.dataclass(frozen=True)
class Options:
    """How edits are made, the same for all of a call.

    Attributes:
      steps, guidance: None: the weights' own.
      crop: "mask", work on a window around the mask; "none", on the whole picture; "auto", around the mask with the
        small weights and where the whole is more than the weights can see at once.
      paste: "feather", pixels outside the mask are the picture's, and its edge is soft; "changed", inside it too where
        the model has changed nothing; "off", what the model made of all; "auto", "changed" with the small weights and
        "feather" with others.
      grow: pixels of the picture by which masks are made larger on all sides.
      step_cache: leave the blocks out of steps whose modulation has changed by no more than this
        (`acejax.edit.step_cache`); None: all steps are whole.
      measure_cache: make each edit with whole steps, too, and tell how far it is from them.
    """

    steps: int | None = None
    guidance: float | None = None
    crop: str = "auto"
    paste: str = "auto"
    grow: int = 0
    step_cache: float | None = None
    measure_cache: bool = False

    def __post_init__(self):
        if self.grow < 0:
            raise UserError(f"grow is {self.grow}; expected 0 pixels or more")
        if self.step_cache is not None and not 0 <= self.step_cache < math.inf:
            raise UserError(f"step_cache is {self.step_cache}; expected 0 or more, such as 0.3")
        if self.measure_cache and self.step_cache is None:
            raise UserError("measure_cache without step_cache: there is nothing to measure")
        for name, known in (("crop", CROPS), ("paste", PASTES)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected {', '.join(known)}")


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What an edit gave.

    Attributes:
      picture: [h, w, 3] uint8.
      task, prompt: what was done, and what the model was told.
      window: the part of the picture that was worked on; None where there was no picture.
      drift: mean difference outside the mask, of 255, before the picture's own pixels were put back; None: no mask.
      tokens: image tokens of the canvas, references included.
      notes: what a user should know of it, in half sentences.
      skipped: steps that the step cache left the blocks out of.
      cache_error: root mean square difference (of 255) of what the model made from what whole steps make; None: not
        measured.
    """

    picture: np.ndarray
    task: str
    prompt: str
    window: Crop | None
    drift: float | None
    tokens: int
    notes: tuple[str, ...] = ()
    skipped: int = 0
    cache_error: float | None = None
