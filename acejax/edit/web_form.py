"""What a page's fields say, as a request, and what a result says to a reader. Knows nothing of Gradio."""

import dataclasses
import hashlib
import pathlib
import re

import numpy as np

from acejax.data import pictures, resize
from acejax.edit.prepare import around
from acejax.edit.profile import Profile
from acejax.edit.record import File
from acejax.edit.request import Options, Request, Result
from acejax.edit.tasks import NEEDED, NONE, Task, find
from acejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a page takes.

    Attributes:
      megabytes: of a file, of 2**20 bytes.
      megapixels: of a picture, and of a result.
      references: their number.
      waiting: edits in the queue.
      kept: seconds until an upload or a result is deleted.
    """

    megabytes: int = 20
    megapixels: int = 50
    references: int = 8
    waiting: int = 16
    kept: int = 3600


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """The fields: pictures as files, `painted` [h, w] uint8 (> 127 = generate) over the picture, at any size."""

    prompt: str = ""
    task: str | None = None
    picture: str | None = None
    painted: np.ndarray | None = None
    mask: str | None = None
    references: tuple[str, ...] = ()
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scale: float | None = None
    width: int | None = None
    height: int | None = None
    grow: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """An edit as it was asked for; `files` are those that were read, `painted` whether the mask is of no file."""

    request: Request
    options: Options
    files: tuple[File, ...]
    painted: bool


def read(profile: Profile, form: Form, limits: Limits) -> Asked:
    """The edit that a form asks for. What the chosen task takes none of is left out: the page does not show it then.

    Raises:
      UserError: a file that is no picture or too large, a number out of range.
    """
    task = find(profile.tasks, form.task) if form.task else Task("", references=(0, None))
    files: list[File] = []

    def opened(field: str, path: str, decode=pictures.decode) -> np.ndarray:
        data, name = _bytes(path), shown(path)
        check_pixels(pictures.size(data, name), f"picture {name}", limits)
        files.append(File(field, f"./{name}", hashlib.sha256(data).hexdigest()))
        return decode(data, name)

    image = opened("image", form.picture) if form.picture and task.image != NONE else None
    if image is not None and task.size == "around" and form.width is None:
        check_pixels(around(image.shape[:2]), "the result", limits)
    mask = None
    if task.mask != NONE and form.mask:
        mask = opened("mask", form.mask, pictures.decode_mask)
        if image is not None:
            pictures.check_mask(mask.shape, image.shape[:2], shown(form.mask))
    painted = mask is None and task.mask != NONE and image is not None and form.painted is not None
    if painted:
        mask = resize.mask(form.painted, image.shape[:2])
    given = form.references if task.references != (0, 0) else ()
    if len(given) > limits.references:
        raise UserError(f"{len(given)} references; this page takes at most {limits.references}")
    references = tuple(opened("references", path) for path in given)
    request = Request(form.prompt, form.task, image, mask, references, size=_size(form, limits), scale=form.scale,
                      seed=int(form.seed or 0))
    return Asked(request, Options(form.steps, form.guidance, grow=int(form.grow or 0)), tuple(files), painted)


def preview(path: str, side: int, limits: Limits) -> np.ndarray:
    """A picture to paint on, [h, w, 3] uint8, its longer side `side`.

    Raises:
      UserError: no picture, or too large.
    """
    data, name = _bytes(path), shown(path)
    size = pictures.size(data, name)
    check_pixels(size, f"picture {name}", limits)
    smaller = tuple(max(1, round(length * side / max(size))) for length in size)
    return resize.antialiased(pictures.picture(data, name, smaller), smaller)


def check_pixels(size: tuple[int, int], what: str, limits: Limits) -> None:
    """Raises UserError for a (height, width) beyond the page's limit."""
    if size[0] * size[1] > limits.megapixels * 1_000_000:
        raise UserError(f"{what} is {size[1]} x {size[0]} pixels (width x height); this page takes at most "
                        f"{limits.megapixels} megapixels")


def shown(path: str) -> str:
    """A file's name, without the server's folders."""
    return pathlib.Path(path).name


def takes(task: Task) -> str:
    """What a task does and takes, in a line of Markdown."""
    least, most = task.references
    count = {(0, 0): "", (1, 1): "one reference", (0, None): "references (optional)"}.get(
        (least, most), f"{least} references" if least == most else f"{least} or more references")
    parts = [f"{name} ({wanted})" if wanted != NEEDED else name
             for name, wanted in (("a picture", task.image), ("a mask", task.mask)) if wanted != NONE]
    listed = ", ".join([*parts, *([count] if count else [])])
    return f"{task.about[:1].upper()}{task.about[1:]}. **Takes** {listed or 'words alone'}."


def about(result: Result, asked: Asked, seconds: float) -> str:
    """What was done, in Markdown."""
    height, width = result.picture.shape[:2]
    told = re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", result.prompt)
    lines = [f"**{result.task}** · “{told}” · {width} × {height} pixels · seed {asked.request.seed} · {seconds:.1f} s"]
    if result.window is not None:
        window = result.window
        lines.append(f"Worked on a window of {window.width} × {window.height} pixels at ({window.left}, {window.top}).")
    lines += [f"{note[:1].upper()}{note[1:]}." for note in result.notes]
    if result.drift is not None:
        lines.append(f"Outside the mask the model drifted by {result.drift:.1f} of 255; your own pixels were put back "
                     "there.")
    return "  \n".join(lines)


def _bytes(path: str) -> bytes:
    if not pathlib.Path(path).exists():
        raise UserError(f"{shown(path)} is no longer here; uploads are kept for a while only, please upload it again")
    return pictures.read(path)


def _size(form: Form, limits: Limits) -> tuple[int, int] | None:
    if form.width is None and form.height is None:
        return None
    if form.width is None or form.height is None:
        raise UserError("the size needs both a width and a height")
    check_pixels((form.height, form.width), "the size", limits)
    return form.height, form.width
