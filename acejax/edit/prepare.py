"""A request becomes the model's canvas, and what the model made of it becomes the result: sizes, windows, pasting."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from acejax.data import resize
from acejax.data.canvas import Canvas, editing
from acejax.data.layout import ASPECT, CanvasConfig, lay_editing, visible
from acejax.data.pictures import MOST_PIXELS
from acejax.data.released import SEAM, output
from acejax.data.released_layout import TOKEN, Size
from acejax.edit import crop, masks, paste, tasks
from acejax.edit.annotators import inside
from acejax.edit.crop import Crop
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Request, Result
from acejax.errors import UserError
from acejax.lcu import CELL

Annotate = Callable[[str, np.ndarray], np.ndarray]  # a name of the annotators, a picture -> a picture
LEAST = 1.1  # times larger: what is less is no super-resolution, and not worth a note
SHORTEST = 4  # pixels a side that is worked on: below them there is nothing to see
WINDOW_STEP = 64  # sides of windows are worked on at multiples of it: masks of all sizes share few compiled programs
FEATHER = 1 / 64  # of a window's longer side


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A request ready for the model.

    Attributes:
      request, task, prompt: what is asked for, the preset's name, what the model is told.
      canvas: its input.
      image, mask: the picture that the result is put into, as large as the result, and where; None: there is none.
      window: its part that is worked on.
      kept: that part as large as it is worked on, where pixels are kept that do not change; else None.
      size: height and width of the result.
      notes: of the result.
    """

    request: Request
    task: str
    prompt: str
    canvas: Canvas
    image: np.ndarray | None
    mask: np.ndarray | None
    window: Crop | None
    kept: np.ndarray | None
    size: Size
    notes: tuple[str, ...]


def prepare(profile: Profile, request: Request, options: Options, annotate: Annotate) -> Prepared:
    """What the model is given for a request.

    Raises:
      UserError: an unknown task, inputs that it lacks or does not take, sizes that can't be.
    """
    given = request.image is not None, request.mask is not None, len(request.references)
    name = request.task or tasks.infer(profile.tasks, request.prompt, *given)
    task = tasks.find(profile.tasks, name)
    tasks.check(name, task, *given)
    parity = profile.canvas.parity is not None
    prompt = tasks.phrase(name, task, request.prompt, raw=parity)
    scale = profile.scale(task) if request.scale is None else request.scale
    if not 0 <= scale <= 1:
        raise UserError(f"scale is {scale}; expected 0 to 1")
    _check_pictures(request)
    if request.control is not None and task.size != "image":
        raise UserError(f"task {name} takes no control: its result is larger than the picture")
    if request.mask is not None:  # the released code has a threshold of its own
        mask = masks.grown(request.mask, options.grow)
        request = dataclasses.replace(request, mask=mask if parity else masks.binary(mask))
    image, mask, size = _framed(profile, name, task, request)
    if options.crop == "mask" and image is not None and (mask is None or parity):
        raise UserError(f"crop is 'mask', and {'parity works on the whole picture' if parity else 'there is no mask'}")
    if options.paste == "changed" and (parity or task.size != "image"):
        raise UserError("paste is 'changed', and " + ("parity keeps no pixel" if parity else
                                                      f"the result of task {name} is larger than the picture"))
    notes = tuple(_notes(profile, image if mask is None else None, request.references))
    if request.control is not None and scale == 1:
        notes += (f"the control is not seen: task {name} with scale 1 hides all that is to change",)
    if image is None:
        shown = [_whole(profile, reference) for reference in request.references]
        canvas = _seamed(editing(profile.canvas, None, None, shown, _near(profile.side, size), scale))
        notes += _enlarged(profile, size, (canvas.mask.shape[0], canvas.widths[-1]))
        if profile.side and size[0] != size[1]:
            notes += ("the small weights have learnt squares: in other shapes symbols may be cut off",)
        return Prepared(request, name, prompt, canvas, None, None, None, None, size, notes)
    if parity:
        seen = _annotated(image, mask, request.control, task.annotator, annotate, profile.canvas.parity)
        canvas = _seamed(editing(profile.canvas, seen, mask, request.references, None, scale))
        return Prepared(request, name, prompt, canvas, image, mask, None, None, visible(size)[2:], notes)
    told = masks.square(mask) if task.square else mask
    window, canvas, working = _window(profile, task, image, told, request, options)
    notes += _enlarged(profile, (window.height, window.width), working)
    seen, generate, control = (None if array is None else crop.cut(array, window, working)
                             for array in (image, told, request.control))
    kept = seen if profile.paste_of(options.paste) == "changed" else None
    if generate is not None and profile.side:
        generate = _boxes(generate, max(1, len(request.references)))
    seen = _annotated(seen, generate, control, task.annotator, annotate, None)
    shown = [_whole(profile, reference) for reference in request.references]
    return Prepared(request, name, prompt, editing(canvas, seen, generate, shown, None, scale), image, mask, window,
                    kept, size, notes)


def finish(prepared: Prepared, made: np.ndarray, options: Options, reconstructed: np.ndarray | None = None
           ) -> Result:
    """The result of a request whose target unit the model made [h, w, 3] uint8 (with parity: its whole canvas).

    `reconstructed` is what the autoencoder alone makes of `prepared.kept`, where there is that.
    """
    canvas, image, mask, window = prepared.canvas, prepared.image, prepared.mask, prepared.window
    drift, tokens = None, canvas.mask.size // TOKEN**2
    if canvas.joined:
        picture = output(made, sum(canvas.widths[:-1]), prepared.size)
    elif window is None:
        picture = resize.antialiased(made, prepared.size)
    else:
        picture = paste.place(image, made, window)
        if mask is not None:
            drift = paste.drift(image, picture, mask, window)
        if reconstructed is not None:
            picture = paste.blend(image, picture, mask, window, paste.changes(made, reconstructed))
        elif mask is not None and options.paste != "off":
            picture = paste.feather(image, picture, mask, window, FEATHER * max(window.height, window.width))
    return Result(picture, prepared.task, prepared.prompt, window, drift, tokens, prepared.notes)


def _check_pictures(request: Request) -> None:
    given = {name: getattr(request, name) for name in ("image", "mask", "control")} | {
        f"reference {at}": reference for at, reference in enumerate(request.references, 1)}
    for name, array in given.items():
        shape = (2, "[h, w] uint8") if name == "mask" else (3, "[h, w, 3] uint8")
        if array is not None and (not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != shape[0]
                                  or array.shape[2:] not in ((), (3,)) or not array.size):
            found = f"{list(array.shape)} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise UserError(f"{name} is {found}; expected {shape[1]}")
    for name in ("mask", "control"):
        array = getattr(request, name)
        if array is None:
            continue
        if request.image is None:
            raise UserError(f"a {name} without a picture to edit")
        if array.shape[:2] != request.image.shape[:2]:
            found, expected = (" x ".join(map(str, part.shape[1::-1])) for part in (array, request.image))
            raise UserError(f"the {name} is {found} pixels (width x height); its picture is {expected}")
    if request.mask is not None and not (request.mask > 127).any():
        raise UserError("the mask has no white pixel: nothing to generate")
    for name, array in given.items():
        if name != "mask" and array is not None and min(array.shape[:2]) < SHORTEST:
            name = "the picture" if name == "image" else name
            raise UserError(f"{name} is {array.shape[1]} x {array.shape[0]} pixels (width x height); expected at least "
                            f"{SHORTEST} a side")


def _notes(profile: Profile, image: np.ndarray | None, references: Sequence[np.ndarray]) -> Iterator[str]:
    """What is not seen of pictures beyond 4:1, the image being one without a mask (of others all is seen that matters).

    The small weights see all of any picture.
    """
    shown = {"the picture": image} | {f"reference {at}": reference for at, reference in enumerate(references, 1)}
    for name, array in shown.items():
        if array is not None and not profile.side and (seen := visible(array.shape[:2])[2:]) != array.shape[:2]:
            done = "edited" if name == "the picture" else "looked at"
            yield (f"{name} is longer than {ASPECT}:1 ({array.shape[1]} x {array.shape[0]}): only its middle, "
                   f"{seen[1]} x {seen[0]} pixels, is {done}")


def _enlarged(profile: Profile, size: Size, working: Size) -> tuple[str, ...]:
    """A note where what is made is much larger than what the model makes at once; with the small weights it always is.
    """
    if profile.side or profile.canvas.parity or math.prod(size) <= LEAST**2 * profile.canvas.max_tokens * TOKEN**2:
        return ()
    return (f"made at {working[1]} x {working[0]} pixels, as the {profile.name} see no more at once, and enlarged to "
            f"{size[1]} x {size[0]}",)


def _seamed(canvas: Canvas) -> Canvas:
    """A canvas whose result will lose columns to the released code's seam, if it has any left."""
    if len(canvas.widths) > 1 and canvas.joined and canvas.widths[-1] <= SEAM:
        raise UserError(f"beside the references the result has {canvas.widths[-1]} columns of the canvas, of which "
                        f"parity='reference' drops {SEAM}; expected narrower references or a wider picture")
    return canvas


def _framed(profile: Profile, name: str, task: tasks.Task, request: Request
            ) -> tuple[np.ndarray | None, np.ndarray | None, Size]:
    """The picture and mask as large as the result, and that size."""
    image, mask, size = request.image, request.mask, request.size
    if size is not None and (min(size) < SHORTEST or max(size) > ASPECT * min(size)) and image is None:
        raise UserError(f"size is {size[1]} x {size[0]} (width x height); expected at least {SHORTEST} a side and at "
                        f"most {ASPECT}:1")
    _check_pixels(size or (1, 1))
    if image is None:
        side = profile.side or 1024
        return None, None, size or (side, side)
    height, width = image.shape[:2]
    if task.size == "image":
        if size not in (None, (height, width)):
            raise UserError(f"size {size[1]} x {size[0]} (width x height) with a picture of {width} x {height}: task "
                            f"{name} gives the picture's own size")
        return image, mask, (height, width)
    budget = profile.canvas.max_tokens * TOKEN**2
    most = min(2.0, math.sqrt(budget / (height * width)))  # times larger, unasked
    wanted = size or (around((height, width)) if task.size == "around" else (int(height * most), int(width * most)))
    if size is None and most < LEAST and task.size == "enlarged":
        raise UserError(f"the picture is {width} x {height} pixels (width x height); the {profile.name} see at most "
                        f"{budget / 1e6:.2f} megapixels at once, so that task {name} can't make it larger")
    _check_pixels(wanted)
    if wanted[0] < height or wanted[1] < width or wanted == (height, width):
        raise UserError(f"size is {wanted[1]} x {wanted[0]} (width x height); task {name} expects a larger one than "
                        f"the picture's, {width} x {height}")
    if task.size == "enlarged":
        if wanted[0] * wanted[1] > budget:
            raise UserError(f"size is {wanted[1]} x {wanted[0]} (width x height); the {profile.name} see at most "
                            f"{budget / 1e6:.2f} megapixels at once")
        return resize.antialiased(image, wanted), None, wanted
    top, left = (wanted[0] - height) // 2, (wanted[1] - width) // 2
    frame = crop.cut(image, Crop(-top, -left, *wanted), wanted)
    mask = np.full(wanted, 255, np.uint8)
    mask[top:top + height, left:left + width] = 0
    return frame, mask, wanted


def around(size: Size) -> Size:
    """The size to which a picture is continued on all sides where none is asked for."""
    return int(size[0] * 1.5), int(size[1] * 1.5)


def _check_pixels(size: Size) -> None:
    if math.prod(size) > MOST_PIXELS:
        raise UserError(f"size is {size[1]} x {size[0]} (width x height); expected at most {MOST_PIXELS / 1e6:.0f} "
                        "megapixels")


def _near(side: int | None, size: Size) -> Size:
    """The size at which small weights make a picture without another: of its shape, with as many pixels as they know.
    """
    if not side:
        return size
    share = side / math.sqrt(math.prod(size)) / TOKEN
    return max(1, round(size[0] * share)) * TOKEN, max(1, round(size[1] * share)) * TOKEN


def _window(profile: Profile, task: tasks.Task, image: np.ndarray, mask: np.ndarray | None, request: Request,
            options: Options) -> tuple[Crop, CanvasConfig, Size]:
    """The part of a picture that is worked on, the canvas that it is laid on, and the size at which it is."""
    size, canvas = image.shape[:2], profile.canvas
    if profile.side:
        close = mask is not None and options.crop != "none"
        window = crop.square(mask, task.share, profile.side // CELL) if close else crop.whole_square(size)
        if window.height > max(size) and not task.square:  # what is there would be seen smaller than it need be
            window = crop.whole_square(size)
        return window, canvas, (profile.side, profile.side)
    seen = crop.middle(size)
    too_much = size != (seen.height, seen.width) or size[0] * size[1] > canvas.max_tokens * TOKEN**2
    if mask is not None and (options.crop == "mask" or options.crop == "auto" and too_much):
        window = crop.around(mask, task.share)
        wanted = crop.working_size(window, canvas.max_tokens)
        canvas = dataclasses.replace(canvas, multiple=WINDOW_STEP)
    else:
        part = np.s_[seen.top:seen.top + seen.height, seen.left:seen.left + seen.width]
        beyond = mask is not None and np.count_nonzero(mask > 127) > np.count_nonzero(mask[part] > 127)
        window = Crop(0, 0, *size) if beyond else seen  # squeezed to 4:1 where it is longer, and stretched again
        wanted = window.height, window.width
    layout = lay_editing(canvas, wanted, [reference.shape[:2] for reference in request.references])
    height, width = layout.height, layout.target_width  # rounded down, sides may be beyond 4:1, where ends are not seen
    return window, canvas, (min(height, ASPECT * width), min(width, ASPECT * height))


def _annotated(image: np.ndarray, mask: np.ndarray | None, control: np.ndarray | None, annotator: str,
               annotate: Annotate, parity: str | None) -> np.ndarray:
    """The map of a picture inside the mask, the picture outside."""
    if control is None and annotator == "none":
        return image
    return inside(annotate(annotator, image) if control is None else control, image, mask, parity=parity)


def _whole(profile: Profile, reference: np.ndarray) -> np.ndarray:
    """A reference as the weights want it."""
    if not profile.side:
        return reference
    return crop.cut(reference, crop.whole_square(reference.shape[:2]), (profile.side, profile.side))


def _boxes(mask: np.ndarray, count: int) -> np.ndarray:
    """The bounding box of each of `count` vertical strips of a mask, grown to the latent grid: what training showed."""
    boxes = np.zeros_like(mask)
    for strip in np.array_split(np.arange(mask.shape[1]), count):
        rows, columns = (np.flatnonzero(mask[:, strip].any(axis)) for axis in (1, 0))
        if len(rows):
            top, left = rows[0] // CELL * CELL, (strip[0] + columns[0]) // CELL * CELL
            bottom, right = -(-(rows[-1] + 1) // CELL) * CELL, -(-(strip[0] + columns[-1] + 1) // CELL) * CELL
            boxes[top:bottom, left:right] = 255
    return boxes
