"""Edits of the test photo, scored against copying the input, grey, and the same model with its condition shuffled."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acejax.demo.pictures import TASKS, Thing
from acejax.demo.scores import color_of, psnr_box, shape_of
from acejax.edit.editor import Editor
from acejax.edit.request import Options, Request

# task: least color accuracy, least shape accuracy, least color accuracy on held-out pairs
THRESHOLDS = {"text": (0.80, None, None), "insert": (0.90, 0.60, 0.80), "recolor": (0.90, None, 0.80),
              "instruct": (0.70, None, 0.50), "reference": (0.85, None, 0.50), "two_references": (0.60, None, None)}
ABOVE_SHUFFLED = 0.30
RECOLOR_GAIN = 6.0  # dB in the box over copying the input

Record = Mapping[str, Any]


def edit(editor: Editor, records: Sequence[Record], seed: int) -> list[np.ndarray]:
    """The model's answer to each record of one task; outside the mask the picture is the input's."""
    requests = [Request(record["prompt"], record["task"], record["image"], record["mask"], record["references"],
                        size=record["target"].shape[:2] if record["image"] is None else None, seed=seed + index)
                for index, record in enumerate(records)]
    results = editor.edit(requests, Options(crop="none", paste="off"))
    return [_stitch(result.picture, record) for result, record in zip(results, records, strict=True)]


def shuffled(records: Sequence[Record]) -> list[Record]:
    """The records with what tells the colour (the references, or else the prompt) taken from the next record."""
    field = "references" if len(records[0]["references"]) else "prompt"
    return [record | {field: other[field]} for record, other in zip(records, [*records[1:], records[0]], strict=True)]


def score(pictures: Sequence[np.ndarray], records: Sequence[Record]) -> dict[str, float]:
    """Fractions of symbols with the right colour and shape, and PSNR in their boxes (dB, mean over samples)."""
    judged = [(picture, thing) for picture, record in zip(pictures, records, strict=True) for thing in things(record)]
    return {"color_accuracy": float(np.mean([color_of(picture, thing) == thing.color for picture, thing in judged])),
            "shape_accuracy": float(np.mean([shape_of(picture, thing) == thing.shape for picture, thing in judged])),
            "psnr_box": float(np.mean([psnr_box(picture, record["target"], things(record))
                                       for picture, record in zip(pictures, records, strict=True)]))}


def evaluate(editor: Editor, test: Mapping[str, Sequence[Record]], held: Mapping[str, Sequence[Record]],
             seed: int) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """The scores of every task, and the edited test pictures."""
    report, pictures = {}, {}
    for task in TASKS:
        records = test[task]
        pictures[task] = edit(editor, records, seed)
        copy = score([_input(record) for record in records], records)
        grey = score([_grey(record) for record in records], records)
        control = score(edit(editor, shuffled(records), seed), records)
        report[task] = score(pictures[task], records) | {
            "samples": len(records), "psnr_box_copy": copy["psnr_box"], "copy_color_accuracy": copy["color_accuracy"],
            "grey_color_accuracy": grey["color_accuracy"], "psnr_box_grey": grey["psnr_box"],
            "shuffled_color_accuracy": control["color_accuracy"], "shuffled_shape_accuracy": control["shape_accuracy"],
            "held": score(edit(editor, held[task], seed), held[task]) | {"samples": len(held[task])}}
    return report, pictures


def missed(report: Mapping[str, Any]) -> list[str]:
    """What fell short of the thresholds, a line each; empty when all is well."""
    lines = []

    def check(name: str, found: float, least: float | None) -> None:
        if least is not None and not found >= least:  # NaN falls short too
            lines.append(f"{name} is {found:.3f}; expected at least {least:.3f}")

    for task, (color, shape, held) in THRESHOLDS.items():
        row = report[task]
        check(f"{task}: color accuracy", row["color_accuracy"], color)
        check(f"{task}: shape accuracy", row["shape_accuracy"], shape)
        check(f"{task}: color accuracy on held-out pairs", row["held"]["color_accuracy"], held)
        check(f"{task}: color accuracy above its shuffled control",
              row["color_accuracy"] - row["shuffled_color_accuracy"], ABOVE_SHUFFLED)
    row = report["recolor"]
    check("recolor: gain in the box over copying (dB)", row["psnr_box"] - row["psnr_box_copy"], RECOLOR_GAIN)
    return lines


def things(record: Record) -> tuple[Thing, ...]:
    """The symbols that a record's target shows."""
    return tuple(Thing(shape, color, tuple(box)) for shape, color, box in json.loads(record["detail"]))


def _inside(record: Record) -> np.ndarray:
    whole = np.full(record["target"].shape[:2], 255, np.uint8)
    return (whole if record["mask"] is None else record["mask"])[..., None] > 127


def _stitch(result: np.ndarray, record: Record) -> np.ndarray:
    return result if record["image"] is None else np.where(_inside(record), result, record["image"])


def _input(record: Record) -> np.ndarray:
    return np.full_like(record["target"], 128) if record["image"] is None else record["image"]


def _grey(record: Record) -> np.ndarray:
    return np.where(_inside(record), 128, _input(record)).astype(np.uint8)
