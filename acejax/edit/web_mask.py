"""The page's canvas: a picture to paint on, of which the server takes the painted area alone.

Not Gradio's own editor: that one needs WebGL, uploads what the server has just sent again and again (6.31), and opens
whatever a client sends, in any format that Pillow knows and of any size.
"""

import base64
import binascii
import io
import json
import pathlib

import numpy as np
from PIL import Image

from acejax.errors import UserError

SIDE = 640  # pixels of the longer side
LONGEST = 4_000_000  # characters that a browser may send
FAINT = 127  # of 255: the edge of a stroke is translucent
URL = "data:image/png;base64,"
SCRIPT = pathlib.Path(__file__).with_name("web_canvas.js")
TEMPLATE = """<div class="paper empty"><div class="hint">The picture to paint on appears here</div><canvas></canvas>
</div>
<div class="tools"><label>Brush <input class="size" type="range" min="4" max="160" value="48"></label>
<label><input class="erase" type="checkbox"> erase</label><button class="clear" type="button">Clear</button></div>"""


def read(value: str | None) -> np.ndarray | None:
    """Where the canvas is painted, [h, w] uint8, 255 = painted; None where nothing is.

    Raises:
      UserError: no strokes of this canvas.
    """
    if not value:
        return None
    try:
        if len(value) > LONGEST:
            raise ValueError("too long")
        url = json.loads(value)["mask"] if value.startswith("{") else value
        mask = None if url is None else _covered(url)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SyntaxError, RecursionError) as error:
        raise UserError("what is painted can't be read") from error
    return mask if mask is not None and mask.any() else None


def painted(picture: np.ndarray, mask: np.ndarray | None = None) -> str:
    """What the canvas shows: a picture [h, w, 3] and, painted on it, a mask [h, w] (> 127 = painted)."""
    layer = None
    if mask is not None:
        layer = _url(np.where(mask[..., None] > 127, np.array((255, 45, 111, 255), np.uint8), np.uint8(0)))
    return json.dumps({"picture": _url(picture), "mask": layer})


def _covered(url: str) -> np.ndarray:
    """Where a layer is painted, [h, w] uint8.

    Raises:
      ValueError, OSError, SyntaxError: no PNG of a canvas.
    """
    if not url.startswith(URL):
        raise ValueError("no PNG")
    try:
        data = base64.b64decode(url[len(URL):], validate=True)
    except binascii.Error as error:
        raise ValueError("no base64") from error
    with Image.open(io.BytesIO(data), formats=("PNG",)) as layer:
        if max(layer.size) > SIDE:
            raise ValueError("too large")
        return np.where(np.asarray(layer.convert("RGBA").getchannel("A")) > FAINT, np.uint8(255), np.uint8(0))


def _url(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return URL + base64.b64encode(file.getvalue()).decode()
