"""The demo's picture of results: a row per edit, with its instruction."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

COLUMNS = ("input", "reference", "reference 2", "output", "truth")


def save_grid(path: epath.PathLike, records: Mapping[str, Sequence[Mapping[str, Any]]],
              pictures: Mapping[str, Sequence[np.ndarray]], rows: int = 4) -> None:
    """Write a PNG: for each task `rows` edits (instruction, input with its mask drawn, references, output, truth)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count, rows = len(records), min(rows, *(len(samples) for samples in records.values()))
    figure, axes = plt.subplots((count + 1) // 2 * rows, 14, figsize=(15.4, 1.16 * rows * ((count + 1) // 2)),
                                gridspec_kw={"width_ratios": [0.9, *[1] * 5, 0.15] * 2, "wspace": 0.06,
                                             "hspace": 0.12})
    for axis in axes.flat:
        axis.axis("off")
    for number, (task, samples) in enumerate(records.items()):
        for line in range(rows):
            row = axes[number // 2 * rows + line, number % 2 * 7:][:6]
            sample = samples[line]
            label = f"{task.replace('_', ' ')}\n\n" if line == 0 else ""
            row[0].text(1, 0.5, label + "\n".join(textwrap.wrap(f"“{sample['prompt']}”", 16)), ha="right", va="center",
                        fontsize=9, transform=row[0].transAxes)
            references = (*sample["references"], None, None)[:2]
            cells = [_with_mask(sample), *references, pictures[task][line], sample["target"]]
            for axis, cell, title in zip(row[1:], cells, COLUMNS, strict=True):
                if cell is not None:
                    axis.imshow(cell, interpolation="nearest")
                if number // 2 == 0 and line == 0:
                    axis.set_title(title, fontsize=9)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def _with_mask(sample: Mapping[str, Any]) -> np.ndarray | None:
    """The input with the border of its mask in white and black dashes; None where there is no input."""
    if sample["image"] is None:
        return None
    picture = sample["image"].copy()
    if sample["mask"] is not None:
        inside = sample["mask"] > 127
        padded = np.pad(inside, 1)
        border = inside & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])
        dash = (np.add.outer(np.arange(len(picture)), np.arange(picture.shape[1])) // 3) % 2 == 0
        picture[border & dash], picture[border & ~dash] = 255, 0
    return picture
