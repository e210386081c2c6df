"""What a run reports: averages over an interval, to JSONL and TensorBoard."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath


def summarize(steps: Sequence[dict[str, np.ndarray]], tasks: Sequence[str]) -> dict[str, float]:
    """Averages over steps: loss, L_tar, L_ref of each reference, and the loss of each task, weighted by their share.

    A part that was absent in all of the steps is left out.
    """
    def mean(value: str, weight: str, index: int) -> float | None:
        weights = np.array([step[weight][index] for step in steps], np.float64)
        values = np.array([np.append(step["ref"], step["tar"])[index] if value == "unit" else step[value][index]
                           for step in steps], np.float64)
        return float(weights @ values / weights.sum()) if weights.sum() > 0 else None

    references = len(steps[0]["ref"])
    summary = {"loss": float(np.mean([step["loss"] for step in steps])),
               "gradient_norm": float(np.mean([step["gradient_norm"] for step in steps])),
               "L_tar": mean("unit", "fraction", references)}
    summary |= {f"L_ref/{number + 1}": mean("unit", "fraction", number) for number in range(references)}
    summary |= {f"task/{name}": mean("task", "task_fraction", index) for index, name in enumerate(tasks)}
    return {name: value for name, value in summary.items() if value is not None}


class Writer:
    """Appends to `<workdir>/metrics.jsonl` and TensorBoard event files.

    A resumed run first drops the lines after its step, which will be written again, and any that a kill cut short.
    `seconds` is the training time that the kept lines tell of.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        from tensorboardX import SummaryWriter

        self._path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if line["step"] <= step]
        self.seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        beside = self._path.parent / "metrics.jsonl.tmp"
        beside.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        beside.replace(self._path)
        self._board = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, none if it is not there."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
