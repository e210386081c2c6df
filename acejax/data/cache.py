"""Features computed once: every sample's latents and text as arrays in memory, grouped by task.

The reference encodes a picture up to three times a step; here a canvas is encoded once, before training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from acejax.data import canvas, latents
from acejax.data.canvas import Canvas
from acejax.data.latents import EncodePictures
from acejax.data.layout import TOKEN, CanvasConfig, lay

Features = dict[str, np.ndarray]
EncodePrompts = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def canvas_of(record: Mapping, scales: Mapping[str, float]) -> Canvas:
    """The training canvas of a record (a sample's fields, decoded); `scales` is the repainting scale of each task."""
    config = CanvasConfig(scale=1.0, scales=scales, reference_height=(1.0, 1.0))
    references = [reference.shape[:2] for reference in record["references"]]
    layout = lay(config, record["target"].shape[:2], references, [1.0] * len(references))
    return canvas.training(config, layout, record["task"], record["target"], record["image"], record["mask"],
                           record["references"])


def encode(canvases: Sequence[Canvas], prompts: Sequence[str], encode_pictures: EncodePictures,
           encode_prompts: EncodePrompts) -> Features:
    """Canvases of one size -> arrays.

    `edit`, `modify`, `target` latents [N, h, w, 16] float32, `mask` [N, 8h, 8w, 1] uint8 of 0 and 1, `unit`
    [N, w / 2] int8 (the unit of each token column: 0, 1, ... for references, -1 for the target), `text` [N, T, D] and
    `pooled` [N, P].
    """
    text, pooled = encode_prompts(prompts)
    features = latents.encode(canvases, encode_pictures)
    return features | {"text": np.asarray(text), "pooled": np.asarray(pooled),
                       "mask": features["mask"].astype(np.uint8),
                       "unit": np.stack([_units(canvas.widths) for canvas in canvases])}


def tabulate(records: Iterable[Mapping], scales: Mapping[str, float], encode_pictures: EncodePictures,
             encode_prompts: EncodePrompts, chunk: int = 64) -> dict[str, Features]:
    """Encode a dataset split, task by task; all canvases of a task must have one size."""
    by_task: dict[str, list[Features]] = {}
    waiting: dict[str, list[Mapping]] = {}

    def flush(task: str) -> None:
        rows = waiting.pop(task)
        by_task.setdefault(task, []).append(encode([canvas_of(row, scales) for row in rows],
                                                   [row["prompt"] for row in rows], encode_pictures, encode_prompts))

    for record in records:
        rows = waiting.setdefault(record["task"], [])
        rows.append(record)
        if len(rows) == chunk:
            flush(record["task"])
    for task in list(waiting):
        flush(task)
    return {task: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for task, parts in by_task.items()}


def _units(widths: Sequence[int]) -> np.ndarray:
    return np.repeat([*range(len(widths) - 1), -1], [width // TOKEN for width in widths]).astype(np.int8)
