"""Edits of a user's own picture with the small weights: crop around the mask, edit at their size, put back."""

from collections.abc import Sequence

import numpy as np

from acejax.demo.pictures import REPAINTING, SIZE, TASKS
from acejax.edit import crop as crops
from acejax.edit.editor import Editor
from acejax.errors import UserError
from acejax.lcu import CELL

# task: needs a picture, needs a mask (None: with or without), number of references
NEEDS = {"text": (False, False, 0), "insert": (True, True, 0), "recolor": (True, True, 0),
         "instruct": (True, False, 0), "reference": (True, True, 1), "two_references": (True, True, 2),
         "remove": (True, None, 0)}
SHARE = {"two_references": 1.0}  # of the window's side that the mask takes, as in training; else half


def check_inputs(prompt: str, image: bool, mask: bool, references: int, task: str | None = None) -> str:
    """The task that these inputs stand for, or `task` where they are its inputs.

    Raises:
      UserError: an unknown task, or inputs that are not the task's.
    """
    if task is None:
        if references:
            task = "reference" if references == 1 else "two_references"
        elif not image:
            task = "text"
        elif prompt.lower().startswith("remove "):
            task = "remove"
        elif not mask:
            task = "instruct"
        else:
            task = "recolor" if prompt.lower().startswith("make ") else "insert"
    if task not in NEEDS:
        raise UserError(f"unknown task {task!r}; the small weights know {', '.join(TASKS)}")
    needs = NEEDS[task]
    if (image, references) != (needs[0], needs[2]) or needs[1] not in (None, mask):
        raise UserError(f"task {task} takes {_inputs(*needs)}; given: {_inputs(image, mask, references)}")
    return task


def edit(editor: Editor, prompt: str, image: np.ndarray | None, mask: np.ndarray | None,
         references: Sequence[np.ndarray] = (), task: str | None = None, seed: int = 0,
         side: int = SIZE) -> np.ndarray:
    """Edit a picture [h, w, 3] of any size inside its mask [h, w] (uint8); every other pixel stays as it is.

    `side` is the weights' picture size, as their note tells. Without a mask the whole picture is worked at it and
    comes back at its own size, blurred by that. Without a picture the result is of it. References are seen whole.

    Raises:
      UserError: an unknown task, or inputs that are not the task's.
    """
    task = check_inputs(prompt, image is not None, mask is not None, len(references), task)
    scale = REPAINTING.get(task, 1.0)
    if image is None:
        return editor(prompt, size=(side, side), scale=scale, seed=seed)
    window = crops.whole(image.shape[:2]) if mask is None else crops.around(
        mask, SHARE.get(task, 0.5), side // CELL)
    seen = None if mask is None else _boxes(crops.cut(mask, window, side), 2 if task == "two_references" else 1)
    shown = [crops.cut(reference, crops.whole(reference.shape[:2]), side) for reference in references]
    result = editor(prompt, crops.cut(image, window, side), seen, shown, scale=scale, seed=seed)
    return crops.paste(image, result, window, mask)


def _boxes(mask: np.ndarray, count: int) -> np.ndarray:
    """The bounding box of each of `count` vertical strips of a mask, grown to the latent grid: what training showed."""
    boxes = np.zeros_like(mask)
    for strip in np.array_split(np.arange(len(mask)), count):
        rows, columns = (np.flatnonzero(mask[:, strip].any(axis)) for axis in (1, 0))
        if len(rows):
            top, left = rows[0] // CELL * CELL, (strip[0] + columns[0]) // CELL * CELL
            bottom, right = -(-(rows[-1] + 1) // CELL) * CELL, -(-(strip[0] + columns[-1] + 1) // CELL) * CELL
            boxes[top:bottom, left:right] = 255
    return boxes


def _inputs(image: bool, mask: bool | None, references: int) -> str:
    parts = [name for name, there in (("a picture", image), ("a mask", mask), ("or no mask", mask is None)) if there]
    return ", ".join([*parts, *([f"{references} reference(s)"] if references else [])]) or "no picture"
