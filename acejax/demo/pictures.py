"""The built-in pictures: coloured named symbols on public-domain photos, with the instruction that explains each.

Photos come from the scikit-image wheel; only those whose docstrings there name CC0 or the public domain are used. The
coffee cup is never trained on: every edit that the demo shows or scores is made on it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from acejax.lcu import CELL

SIZE = 64  # of a picture's sides, where nothing else is said; other sizes are multiples of 16
SCALES = (1.5, 2.25, 3.375)  # of a photo's short side, in sides of a picture, where nothing else is said
TEST_PHOTO = "coffee"
PHOTOS = {  # name in prompts: skimage.data function
    "person": "astronaut", "cat": "chelsea", "sky": "rocket", "stars": "hubble_deep_field", "eye": "retina",
    "bricks": "brick", "grass": "grass", "gravel": "gravel", "coffee": "coffee"}
COLORS = {
    "red": (215, 35, 40), "orange": (250, 140, 20), "yellow": (250, 225, 60), "green": (40, 150, 70),
    "blue": (40, 90, 220), "purple": (135, 55, 175), "pink": (255, 130, 190), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "moon")
HELD_PAIRS = frozenset({("heart", "blue"), ("star", "red"), ("circle", "purple"), ("square", "orange"),
                        ("triangle", "green"), ("moon", "yellow")})  # (shape, color) never trained on
TASKS = ("text", "insert", "recolor", "instruct", "reference", "two_references", "remove")
SPLITS = ("train", "test", "held", "validation")
REPAINTING = {"recolor": 0.0, "instruct": 0.0, "remove": 0.0}  # what lies under the mask is seen; 1 elsewhere: hidden


@dataclasses.dataclass(frozen=True)
class Thing:
    """A symbol in a picture: `box` is (top, left, side) in pixels."""

    shape: str
    color: str
    box: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training or test item. Pictures are [size, size, 3] uint8, the mask [size, size] with 255 = generate.

    `image` is the picture to edit or None; `mask` None means the whole picture. `things` are the symbols the target
    must show, in the order of the references; where the task is to remove, that it must not show.
    """

    task: str
    prompt: str
    target: np.ndarray
    image: np.ndarray | None
    mask: np.ndarray | None
    references: tuple[np.ndarray, ...]
    things: tuple[Thing, ...]


@functools.lru_cache(maxsize=256)
def silhouette(shape: str, side: int) -> np.ndarray:
    """Coverage of a symbol in its box, [side, side] float32 in [0, 1], antialiased, one pixel of margin."""
    scale = 8
    canvas = Image.new("L", (side * scale, side * scale))
    _draw(ImageDraw.Draw(canvas), shape, scale, (side - 1) * scale)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _draw(draw: ImageDraw.ImageDraw, shape: str, low: float, high: float) -> None:
    size, middle = high - low, (low + high) / 2

    def polygon(points):  # points in the unit square, y down
        draw.polygon([(low + x * size, low + y * size) for x, y in points], fill=255)

    match shape:
        case "circle":
            draw.ellipse([low, low, high, high], fill=255)
        case "square":
            draw.rectangle([low + 0.06 * size, low + 0.06 * size, high - 0.06 * size, high - 0.06 * size], fill=255)
        case "triangle":
            polygon([(0.5, 0.02), (1, 0.95), (0, 0.95)])
        case "diamond":
            polygon([(0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5)])
        case "cross":
            draw.rectangle([low, middle - 0.17 * size, high, middle + 0.17 * size], fill=255)
            draw.rectangle([middle - 0.17 * size, low, middle + 0.17 * size, high], fill=255)
        case "star":
            turns = np.pi * np.arange(10) / 5
            radius = np.where(np.arange(10) % 2, 0.23, 0.54)
            polygon(zip(0.5 + radius * np.sin(turns), 0.54 - radius * np.cos(turns), strict=True))
        case "heart":
            t = np.linspace(0, 2 * np.pi, 60)
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            polygon(zip(0.5 + np.sin(t) ** 3 / 2, 0.44 - y / 30, strict=True))
        case "moon":
            draw.ellipse([low, low, high, high], fill=255)
            draw.ellipse([low + 0.36 * size, low - 0.06 * size, high + 0.24 * size, high - 0.1 * size], fill=0)
        case _:
            raise ValueError(f"no symbol named {shape!r}")


def paint(picture: np.ndarray, thing: Thing) -> np.ndarray:
    """A copy of the picture with the symbol on it."""
    top, left, side = thing.box
    cover = silhouette(thing.shape, side)[..., None]
    out = picture.copy()
    window = out[top:top + side, left:left + side]
    window[:] = np.rint(window * (1 - cover) + np.array(COLORS[thing.color], np.float32) * cover).astype(np.uint8)
    return out


@functools.lru_cache(maxsize=32)
def photo(name: str, size: int = SIZE, scales: tuple[float, ...] = SCALES) -> tuple[np.ndarray, ...]:
    """A photo at several scales for pictures of a size, [h, w, 3] uint8: the short side is `scales` times the size."""
    from skimage import data

    pixels = getattr(data, PHOTOS[name])()
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)
    picture = Image.fromarray(pixels[..., :3])
    sizes = [tuple(round(side * scale * size / min(picture.size)) for side in picture.size) for scale in scales]
    return tuple(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) for size in sizes)


def box_sides(size: int) -> range:
    """Sides of the symbols in pictures of a size: on the latent grid, three eighths to one half of the size."""
    return range(-(-size * 3 // (8 * CELL)) * CELL, size // 2 + 1, CELL)


def samples(count: int, task: str, seed: int, split: str = "train", size: int = SIZE,
            scales: tuple[float, ...] = SCALES, vary: bool = False) -> Iterator[Sample]:
    """`count` samples of a task on crops of photos, as by `photo`; fixed by what is given.

    Splits: "train" and "validation" (training photos, no held-out pair), "test" (the test photo, trained pairs),
    "held" (the test photo, held-out pairs only). `vary` turns the training photos and, where no prompt names them,
    changes their colours, and lays an ellipse of another one into some, so that eight photos stand for more.
    """
    rng = np.random.default_rng([seed, TASKS.index(task), SPLITS.index(split)])
    pairs = [pair for pair in itertools.product(SHAPES, COLORS) if (pair in HELD_PAIRS) == (split == "held")]
    for _ in range(count):
        yield _sample(rng, task, split, pairs, size, scales, vary and split == "train")


def _sample(rng: np.random.Generator, task: str, split: str, pairs: list[tuple[str, str]], size: int,
            scales: tuple[float, ...], vary: bool) -> Sample:
    def pick(options):
        return options[rng.integers(len(options))]

    def thing(box):
        return Thing(*pick(pairs), box)

    def box(side, left=0, right=size):
        return (CELL * int(rng.integers((size - side) // CELL + 1)),
                left + CELL * int(rng.integers((right - left - side) // CELL + 1)), side)

    def some(*between):
        return thing(box(int(pick(box_sides(size))), *between))

    def window(place):
        picture = pick(photo(place, size, scales))
        top, left = (rng.integers(side - size + 1) for side in picture.shape[:2])
        cut = picture[top:top + size, left:left + size]
        cut = cut[:, ::-1].copy() if rng.integers(2) else cut.copy()
        return _varied(rng, cut, named=task == "text") if vary else cut

    def crop(place):
        shown = window(place)
        if not vary or task == "text" or rng.integers(4):
            return shown
        cover = _ellipse(rng, size)[..., None]
        return np.rint(shown * (1 - cover) + window(pick(training)) * cover).astype(np.uint8)

    def reference(shown):
        sides = [size // 2, size * 5 // (8 * CELL) * CELL]
        return paint(crop(pick(training)), dataclasses.replace(shown, box=box(int(pick(sides)))))

    training = [name for name in PHOTOS if name != TEST_PHOTO]
    place = TEST_PHOTO if split in ("test", "held") and task != "text" else pick(training)
    background = crop(place)
    image, references, masked = background, (), task not in ("text", "instruct")
    match task:
        case "text":
            side = size // 2 // CELL * CELL
            things = (thing(((size - side) // 2 // CELL * CELL,) * 2 + (side,)),)
            prompt = f"{_article(things[0].color)} {things[0].shape} on {place}"
            image = None
        case "insert":
            things = (some(),)
            prompt = f"{_article(things[0].color)} {things[0].shape}"
        case "recolor" | "instruct":
            things = (some(),)
            others = [color for color in COLORS if color != things[0].color and (
                split in ("test", "held") or (things[0].shape, color) not in HELD_PAIRS)]
            image = paint(background, dataclasses.replace(things[0], color=pick(others)))
            name = "it" if task == "recolor" else f"the {things[0].shape}"
            prompt = f"make {name} {things[0].color}"
        case "remove":
            things = (some(),)
            image = paint(background, things[0])
            masked = bool(rng.integers(2))
            prompt = "remove it" if masked else f"remove the {things[0].shape}"
        case "reference":
            things = (some(),)
            references = (reference(things[0]),)
            prompt = f"this {things[0].shape}"
        case "two_references":
            half = size // 2 // CELL * CELL
            things = (some(0, half), some(half, size))
            references = tuple(reference(shown) for shown in things)
            prompt = f"this {things[0].shape} and this {things[1].shape}"
    target = background if task == "remove" else functools.reduce(paint, things, background)
    mask = None
    if masked:
        mask = np.zeros((size, size), np.uint8)
        for top, left, side in (shown.box for shown in things):
            mask[top:top + side, left:left + side] = 255
    return Sample(task, prompt, target, image, mask, references, things)


def _varied(rng: np.random.Generator, window: np.ndarray, named: bool) -> np.ndarray:
    """A square window turned by quarters and, two times of three where it is not named, in other colours."""
    window = np.rot90(window, rng.integers(4)).copy()
    if named or rng.integers(3) == 0:
        return window
    shown = window[..., rng.permutation(3)] / 255
    grey = shown.mean(-1, keepdims=True)
    shown = np.clip(grey + (shown - grey) * rng.uniform(0.3, 1.6), 0, 1)
    shown = shown ** np.exp(rng.uniform(-0.5, 0.5)) * rng.uniform(0.6, 1.3, 3)
    return np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)


def _ellipse(rng: np.random.Generator, size: int) -> np.ndarray:
    """Coverage [size, size] of an ellipse that lies in a square in part, antialiased."""
    center, radii, turn = rng.uniform(-0.2, 1.2, 2), rng.uniform(0.3, 1.2, 2), rng.uniform(0, np.pi)
    y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")
    y, x = y - center[0], x - center[1]
    along, across = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn)
    return np.clip((1 - np.hypot(along / radii[0], across / radii[1])) * radii.min() * size + 0.5, 0, 1)


def _article(color: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color}"
