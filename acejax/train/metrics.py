"""What a run reports, to `<workdir>/metrics.jsonl` and TensorBoard; names are stable:

    loss                            of the steps that were not skipped, as all averages here
    L_tar, L_ref, L_ref/K           its parts: the target, all references, reference K; loss = the sum of share x part.
                                    L_ref is 0 where there is no reference
    task/NAME                       of a task's samples
    sigma/0.3                       of the noise levels from 0.3 to below 0.4
    gradient_norm                   global, before clipping
    learning_rate                   of the interval's last step
    skipped                         steps of the interval whose loss or gradient was not finite: they changed nothing
    seconds                         of training since the first step, interruptions, validation and saves left out
    steps_per_second                without validation and saves, as all rates
    tokens_per_second_per_device    text and image tokens, padding left out
    padding                         share of padding in the tokens that were computed
    mfu                             model FLOPs of the computed tokens over the devices' peak (accelerators that
                                    `acejax.parallel.chips` knows)
    device_memory_gb                the most that a device of this host has held since the start, in 1e9 bytes
    host_memory_gb                  the most that this process has held, where devices do not tell: a CPU
    validation/loss, validation/task/NAME, validation/sigma/0.3, validation/L_tar, validation/L_ref/K
                                    of held-out samples at fixed noise, at exactly these noise levels
    validation/psnr_inside/TASK, validation/psnr_outside/TASK
                                    dB of sampled targets, inside and outside their masks
    validation/samples              the grid of pictures (TensorBoard; also `<workdir>/samples/step_000500.png`)

A line has what there was: no `L_ref/2` in a stage without references, no `loss` where every step was skipped.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from acejax.data import written
from acejax.errors import UserError

Metrics = Mapping[str, np.ndarray]


def summarize(steps: Sequence[Metrics], tasks: Sequence[str]) -> dict[str, float]:
    """Averages over an interval's steps (metrics of `acejax.train.step.train_step`): loss and gradient norm of each
    step alike, parts of the loss by their share in each step."""
    good = [step for step in steps if not step["skipped"]]
    values = {"skipped": float(len(steps) - len(good))}
    if not good:
        return values

    def means(name: str, share: str) -> list[float | None]:
        found, weights = (np.array([step[part] for step in good], np.float64) for part in (name, share))
        totals = weights.sum(0)
        return [float(weights[:, place] @ found[:, place] / total) if total > 0 else None
                for place, total in enumerate(totals)]

    units = [{"unit": np.append(step["ref"], step["tar"]), "fraction": step["fraction"]} for step in good]
    good = [dict(step) | unit for step, unit in zip(good, units, strict=True)]
    *references, target = means("unit", "fraction")
    values |= {name: float(np.mean([step[name] for step in good])) for name in ("loss", "gradient_norm")}
    share = sum(unit["fraction"][:-1].sum() for unit in units)
    error = sum(unit["fraction"][:-1] @ unit["unit"][:-1] for unit in units)
    values |= {"L_tar": target, "L_ref": float(error / share) if share else 0.0}
    values |= {f"L_ref/{number}": value for number, value in enumerate(references, 1)}
    values |= {f"task/{name}": value for name, value in zip(tasks, means("task", "task_fraction"), strict=True)}
    bins = means("sigma", "sigma_fraction")
    values |= {f"sigma/{place / len(bins):.1f}": value for place, value in enumerate(bins)}
    return {name: value for name, value in values.items() if value is not None}


class Writer:
    """Appends to `<workdir>/metrics.jsonl` and TensorBoard event files, in process 0; the others write nothing.

    A resumed run first drops the lines after its step, which will be written again, and any that a kill cut short.
    `seconds` is the training time that the kept lines tell of.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        self._workdir, self.seconds, self._board = epath.Path(workdir), 0.0, None
        if jax.process_index():
            return
        from tensorboardX import SummaryWriter

        self._path = self._workdir / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if line["step"] <= step]
        self.seconds = next((line["seconds"] for line in reversed(kept) if "seconds" in line), 0.0)
        written.write(self._path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        self._board = SummaryWriter(str(workdir), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A line: what was found at a step.

        Raises:
          UserError: it can't be written.
        """
        if self._board is None:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        try:
            if "://" in str(self._path):  # an object store appends nothing: it would be this line alone
                self._path.write_text(self._path.read_text() + line)
            else:
                with self._path.open("a") as file:
                    file.write(line)
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error}") from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, picture: np.ndarray) -> None:
        """The grid of a step's samples, [h, w, 3] uint8.

        Raises:
          UserError: it can't be written.
        """
        if self._board is None:
            return
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        path = self._workdir / "samples" / f"step_{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write(path, buffer.getvalue())
        self._board.add_image("validation/samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
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
