"""A contact sheet of what the model will see of some samples: canvas, mask, what is to be changed, target, prompt."""

import io
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from acejax.data import canvas, prepare
from acejax.data.augment import AugmentConfig
from acejax.data.layout import CanvasConfig
from acejax.data.manifest import Manifest, Row

CELL = 300  # pixels: the greatest side of one picture on the sheet
GAP = 8
TEXT = 14  # height of letters
MOST = 24  # samples
_TINT = np.array([255, 0, 90])  # where the mask is white
_PANELS = ("references and source, mask in red", "kept (edit)", "to be changed (modify)", "target")


def pick(rows: Iterable[Row]) -> list[Row]:
    """Up to three samples of each task, spread over its lines; of many tasks fewer, and at most MOST."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    picked, per_task = [], max(1, min(3, MOST // max(1, len(tasks))))
    for task in sorted(tasks):
        places = np.linspace(0, len(tasks[task]) - 1, min(per_task, len(tasks[task])))
        picked += [tasks[task][int(place)] for place in places]
    return picked[:MOST]


def sheet(manifest: Manifest, rows: Sequence[Row], config: CanvasConfig, seed: int = 0) -> bytes:
    """A PNG with a line of pictures for each of `rows`.

    Raises:
      UserError: a picture that cannot be decoded.
    """
    parts = [_sample(manifest, row, config, np.random.default_rng((seed, row.line))) for row in rows]
    width = max([part.width for part in parts], default=CELL)
    whole = Image.new("RGB", (width, max(1, sum(part.height for part in parts))), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    return buffer.getvalue()


def panels(manifest: Manifest, row: Row, config: CanvasConfig, rng: np.random.Generator
           ) -> tuple[list[np.ndarray], int]:
    """What the model gets of a sample, pictures [h, W, 3] uint8 in the order of _PANELS (no modify where not split),
    and its tokens."""
    sample = manifest.sample(row)
    plan = prepare.plan(sample, config, AugmentConfig(), rng)
    made = prepare.compose(sample, config, plan)
    contents = canvas.contents(made)
    source = np.where(made.present[..., None], made.source, 127).astype(np.float32)
    weight = 0.45 * contents.mask
    shown = np.rint(source * (1 - weight) + _TINT * weight).astype(np.uint8)
    rest = [contents.edit, contents.modify, contents.target]
    return [shown, *(canvas.denormalize(part) for part in rest if part is not None)], plan.layout.tokens


def _sample(manifest: Manifest, row: Row, config: CanvasConfig, rng: np.random.Generator) -> Image.Image:
    made, tokens = panels(manifest, row, config, rng)
    names = _PANELS if len(made) == len(_PANELS) else (_PANELS[0], "source (edit)", _PANELS[3])
    scale = min(1.0, CELL / made[0].shape[0], 2 * CELL / made[0].shape[1])
    size = max(1, round(made[0].shape[1] * scale)), max(1, round(made[0].shape[0] * scale))
    width = len(made) * (max(size[0], CELL // 2) + GAP) + GAP
    font = ImageFont.load_default(TEXT)
    head = f"{manifest.where(row.line)}   {row.task}   {made[0].shape[1]} x {made[0].shape[0]} pixels, {tokens} tokens"
    letters = max(20, int(width / (0.55 * TEXT)))
    prompt = textwrap.wrap(" ".join(row.prompt.split()), letters)[:6] or [""]
    line = TEXT + 4
    part = Image.new("RGB", (width, GAP + 2 * line + size[1] + GAP + len(prompt) * line + 2 * GAP), "white")
    draw = ImageDraw.Draw(part)
    draw.text((GAP, GAP), head, "black", font)
    for place, (name, picture) in enumerate(zip(names, made, strict=True)):
        left = GAP + place * (max(size[0], CELL // 2) + GAP)
        draw.text((left, GAP + line), name, "grey", ImageFont.load_default(TEXT - 3))
        part.paste(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), (left, GAP + 2 * line))
    for place, text in enumerate(prompt):
        draw.text((GAP, 2 * GAP + 2 * line + size[1] + place * line), text, "black", font)
    draw.line((0, part.height - 1, part.width, part.height - 1), "lightgrey")
    return part
