"""A picture of samples: a line each, what was given, what should come of it and what came, the prompt under it."""

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

COLUMNS = ("references", "edit", "to be changed", "mask", "target", "sample")
SIDE = 192  # pixels: the height of a picture, unless it would be wider than twice that
GAP = 8
TEXT = 13  # height of letters
MOST_TEXT = 2  # lines of a prompt


@dataclasses.dataclass(frozen=True)
class Line:
    """A sample.

    Attributes:
      pictures: of each of COLUMNS, [h, w, 3] or [h, w] uint8, or None.
      about: its task and what it scored.
      prompt: what was asked for.
    """

    pictures: Sequence[np.ndarray | None]
    about: str
    prompt: str


def draw(lines: Sequence[Line]) -> np.ndarray:
    """The grid, [h, w, 3] uint8; a column that no line has is left out."""
    columns = [place for place in range(len(COLUMNS)) if any(line.pictures[place] is not None for line in lines)]
    cells = [[None if line.pictures[place] is None else _shown(line.pictures[place]) for place in columns]
             for line in lines]
    font, height = ImageFont.load_default(TEXT), TEXT + 5
    widths = [max([int(font.getlength(COLUMNS[place])), *(cell.width for row in cells if (cell := row[number]))])
              for number, place in enumerate(columns)]
    width = GAP + sum(wide + GAP for wide in widths)
    letters = max(20, int((width - 2 * GAP) / font.getlength("n")))
    parts = [_line(line, row, widths, font, letters) for line, row in zip(lines, cells, strict=True)]

    sheet = Image.new("RGB", (width, height + GAP + sum(part.height for part in parts)), "white")
    left, top = GAP, GAP + height
    for place, wide in zip(columns, widths, strict=True):
        ImageDraw.Draw(sheet).text((left, GAP), COLUMNS[place], "grey", font)
        left += wide + GAP
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return np.asarray(sheet)


def _line(line: Line, cells: Sequence[Image.Image | None], widths: Sequence[int], font: ImageFont.FreeTypeFont,
          letters: int) -> Image.Image:
    text = [line.about, *textwrap.wrap(" ".join(line.prompt.split()), letters, max_lines=MOST_TEXT, placeholder=" ...")]
    tall, step = max(cell.height for cell in cells if cell), TEXT + 5
    part = Image.new("RGB", (GAP + sum(wide + GAP for wide in widths), tall + GAP // 2 + len(text) * step + GAP),
                     "white")
    left = GAP
    for cell, wide in zip(cells, widths, strict=True):
        if cell:
            part.paste(cell, (left, 0))
        left += wide + GAP
    for number, words in enumerate(text):
        ImageDraw.Draw(part).text((GAP, tall + GAP // 2 + number * step), words, "black" if number else "grey", font)
    return part


def _shown(picture: np.ndarray) -> Image.Image:
    scale = min(SIDE / picture.shape[0], 2 * SIDE / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    filtered = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    shown = Image.fromarray(picture).convert("RGB").resize(size, filtered)
    return ImageOps.expand(shown, 1, "lightgrey")  # a white mask is seen on white
