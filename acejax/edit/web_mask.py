"""The page's canvas: a picture to paint on, of which the server takes the painted area alone.

Gradio's own editor would open whatever a client sends, in any format that Pillow knows and of any size, and keep
strokes that nobody runs. Here only PNG and WebP layers of the canvas's size are opened, and few are kept.
"""

import io
from collections import OrderedDict
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from acejax.errors import UserError

SIDE = 640  # pixels of the longer side
KEPT = 64  # canvases whose strokes wait for their edit
FORMATS = ("PNG", "WEBP")
FAINT = 32  # of 255: the brush is translucent
COLOR = "#ff2d6f"


class Canvas(gr.ImageEditor):
    """Gives [h, w] uint8, 255 where painted, or None where nothing is."""

    def __init__(self, **more: Any):
        super().__init__(type="numpy", sources=(), transforms=(), layers=False, format="png",
                         brush=gr.Brush(default_size=40, colors=[(COLOR, 0.6)], color_mode="fixed"),
                         eraser=gr.Eraser(default_size=40), **more)
        self.blob_storage = _Recent()

    def get_block_name(self) -> str:
        """The browser's side is Gradio's."""
        return "imageeditor"

    def preprocess(self, payload: Any) -> np.ndarray | None:
        """Raises:
          gr.Error: no strokes of this canvas.
        """
        if payload is None:
            return None
        kept = payload if payload.id is None else self.blob_storage.pop(payload.id, None)
        layers = [layer for layer in (kept.layers if kept else None) or () if layer is not None]
        try:
            masks = [_covered(layer if isinstance(layer, bytes) else layer.path) for layer in layers]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        masks = [mask for mask in masks if mask.any()]
        if len({mask.shape for mask in masks}) > 1:
            raise gr.Error("layers of the canvas are of unequal sizes", print_exception=False)
        return np.max(masks, axis=0) if masks else None


def painted(picture: np.ndarray, mask: np.ndarray | None = None) -> dict[str, Any]:
    """What the canvas shows: a picture [h, w, 3] and, painted on it, a mask [h, w] (> 127 = painted)."""
    layers = []
    if mask is not None:
        color = (*(int(COLOR[at:at + 2], 16) for at in (1, 3, 5)), 153)
        layers = [np.where(mask[..., None] > 127, np.array(color, np.uint8), np.uint8(0))]
    return {"background": picture, "layers": layers, "composite": None}


def _covered(source: bytes | str) -> np.ndarray:
    """Where a layer is painted, [h, w] uint8.

    Raises:
      UserError: no picture of a canvas.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as layer:
            if max(layer.size) > 2 * SIDE:
                raise UserError(f"a layer of the canvas is {layer.width} x {layer.height} pixels; expected at most "
                                f"{2 * SIDE} a side")
            alpha = np.asarray(layer.convert("RGBA").getchannel("A"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("a layer of the canvas can't be read") from error
    return np.where(alpha > FAINT, np.uint8(255), np.uint8(0))


class _Recent(OrderedDict):
    """A dict of the last KEPT entries."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > KEPT:
            self.popitem(last=False)
