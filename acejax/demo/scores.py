"""How an edited picture is judged: the colour and the shape that stand where the symbol should be, and PSNR."""

import numpy as np

from acejax.demo.pictures import COLORS, SHAPES, Thing, silhouette


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays of one shape."""
    error = np.mean((picture.astype(np.float64) - truth.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def color_of(picture: np.ndarray, thing: Thing, rows: slice = slice(None)) -> str:
    """The palette colour nearest (in CIELAB) to the mean colour inside the symbol's silhouette, or some rows of it."""
    from skimage.color import rgb2lab

    inside = silhouette(thing.shape, thing.box[2])[rows] > 0.9
    mean = _window(picture, thing)[rows][inside].mean(0) / 255
    palette = np.array(list(COLORS.values())) / 255
    return list(COLORS)[int(np.argmin(np.linalg.norm(rgb2lab(palette) - rgb2lab(mean), axis=-1)))]


def shape_of(picture: np.ndarray, thing: Thing) -> str:
    """The shape whose silhouette correlates best, over the box, with how near each pixel is to the symbol's colour."""
    distance = np.linalg.norm(_window(picture, thing).astype(np.float64) - COLORS[thing.color], axis=-1)
    near = np.exp(-((distance / 80) ** 2)).ravel()
    near = (near - near.mean()) / (near.std() + 1e-6)
    covers = [silhouette(shape, thing.box[2]).ravel() for shape in SHAPES]
    return SHAPES[int(np.argmax([near @ (cover - cover.mean()) / cover.std() for cover in covers]))]


def is_gone(picture: np.ndarray, truth: np.ndarray, thing: Thing) -> bool:
    """Whether, where the symbol was, the picture is nearer to what lay under it (truth) than to any of the colours."""
    inside = silhouette(thing.shape, thing.box[2]) > 0.9
    found, under = (_window(one, thing)[inside].astype(np.float64) for one in (picture, truth))
    return bool(np.mean((found - under) ** 2) < min(np.mean((found - color) ** 2) for color in COLORS.values()))


def psnr_box(picture: np.ndarray, truth: np.ndarray, things: tuple[Thing, ...]) -> float:
    """PSNR over the symbols' boxes."""
    def pixels(image):
        return np.concatenate([_window(image, thing).reshape(-1, 3) for thing in things])
    return psnr(pixels(picture), pixels(truth))


def _window(picture: np.ndarray, thing: Thing) -> np.ndarray:
    top, left, side = thing.box
    return picture[top:top + side, left:left + side]
