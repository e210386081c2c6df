"""What a set of weights wants: its tasks, the canvas it was trained on, steps and guidance."""

import dataclasses
from collections.abc import Mapping

from acejax.data.layout import CanvasConfig
from acejax.edit.tasks import TASKS, Task
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig

MOST_STEPS = 1000
MOST_GUIDANCE = 100.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """How one kind of weights is used for editing.

    Attributes:
      name: for messages.
      tasks: the presets that it knows, the first that takes the given inputs being the default.
      canvas: how pictures become its input.
      steps, guidance: unless asked for others; guidance None: the model has none.
      side: small weights see square windows of this many pixels a side, masks as boxes; None: any size.
    """

    name: str
    tasks: Mapping[str, Task]
    canvas: CanvasConfig
    steps: int
    guidance: float | None
    side: int | None = None

    @classmethod
    def of(cls, config: MMDiTConfig, parity: str | None = None) -> "Profile":
        """For weights of FLUX.1-dev (64 channels), Fill with its LoRAs (384) or the ACE++ model (448).

        Raises:
          UserError: other channels.
        """
        canvases = {64: CanvasConfig, 384: CanvasConfig.lora, 448: CanvasConfig}
        names = {64: "text-to-picture weights", 384: "Fill weights", 448: "ACE++ weights"}
        if config.in_channels not in canvases:
            raise UserError(f"weights of {config.in_channels} input channels; expected 64 (text to picture), 384 "
                            "(Fill) or 448 (ACE++)")
        text_only = config.in_channels == 64
        guidance = (3.5 if text_only else 50.0) if config.guidance_embed else None
        return cls(names[config.in_channels], {"text": TASKS["text"]} if text_only else TASKS,
                   canvases[config.in_channels](parity=parity), 28, guidance)

    def scale(self, task: Task) -> float:
        """The repainting scale of a task."""
        return task.scale if self.canvas.split else task.lora_scale

    def paste_of(self, paste: str) -> str:
        """`paste` of `acejax.edit.request.Options`, with "auto" resolved for these weights."""
        return paste if paste != "auto" else "changed" if self.side else "feather"

    def steps_of(self, steps: int | None) -> int:
        """The steps asked for, or its own.

        Raises:
          UserError: none, or too many.
        """
        if steps is None:
            return self.steps
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps is {steps}; expected 1 to {MOST_STEPS}")
        return steps

    def guidance_of(self, guidance: float | None) -> float | None:
        """The guidance asked for, or its own.

        Raises:
          UserError: out of range, or of a model that has none.
        """
        if guidance is None:
            return self.guidance
        if self.guidance is None:
            raise UserError(f"guidance is {guidance}; the {self.name} take none")
        if not 0 <= guidance <= MOST_GUIDANCE:
            raise UserError(f"guidance is {guidance}; expected 0 to {MOST_GUIDANCE:g}")
        return float(guidance)
