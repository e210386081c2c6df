"""What the model makes of held-out samples: Euler sampling, PSNR inside and outside the mask, a grid of pictures."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acejax import flow, lcu
from acejax.data.stream import Row
from acejax.model.mmdit import apply
from acejax.train.grid import Line, draw
from acejax.train.held import Held, HeldBatch
from acejax.train.step import Batch, StepConfig, tokens, whole

Decode = Callable[[np.ndarray], np.ndarray]  # latents [h, w, 16] -> picture [8h, 8w, 3] uint8
BEST = 100.0  # dB, of pictures that are equal


class Samples:
    """Samples of each task, made from the same noise each time.

    PSNR is of the target unit in pixels, against the decoded target, so that what the autoencoder loses does not
    count; the mean over a task's samples.

    Args:
      setting: of the training step.
      held: the samples; the first `count` of each task are taken.
      steps, guidance: of Euler sampling; guidance is an input of models that have it.
      mesh: of the parameters.
      decode: latents to a picture, in process 0 alone.
      prompt: a sample's, from its index in the whole table.
      frozen: what a LoRA is trained on (`acejax.train.step.whole`).
    """

    def __init__(self, setting: StepConfig, held: Held, count: int, steps: int, guidance: float, mesh: Mesh,
                 decode: Decode, prompt: Callable[[int], str] = lambda index: "", frozen: Any = None):
        self._held, self._decode, self._steps, self._prompt, self._frozen = held, decode, steps, prompt, frozen
        task = held.table.task
        self._chosen = [int(sample) for number in range(len(held.table.tasks))
                        for sample in np.flatnonzero(task == number)[:count]]
        self._batches = held.batches(self._chosen)
        self._run = sampler(setting, mesh, guidance)
        self._given: dict[int, tuple[Row, list[np.ndarray | None]]] = {}  # what is shown beside a sample stays the same

    def __call__(self, params: Any) -> tuple[dict[str, float], np.ndarray | None]:
        """`validation/psnr_inside/TASK` and `validation/psnr_outside/TASK` in dB, and the grid [h, w, 3] uint8.

        Process 0 decodes; the others have no values and no grid.
        """
        made = sample_held(self._run, params, self._held, self._batches, self._steps, self._frozen)
        if jax.process_index():
            return {}, None
        table, lines, scores = self._held.table, [], {}
        for sample in self._chosen:
            if sample not in self._given:
                row = self._held.row(sample)
                self._given[sample] = row, given(row, self._decode)
            row, shown = self._given[sample]
            picture = self._decode(target_unit(row, made[sample]))
            task, scored = table.tasks[table.task[sample]], psnr(shown[-1], picture, shown[-2])
            for name, value in scored.items():
                scores.setdefault(f"validation/psnr_{name}/{task}", []).append(value)
            about = f"{task}   {', '.join(f'{value:.1f} dB {name}' for name, value in scored.items())}"
            lines.append(Line([*shown, picture], about, self._prompt(int(table.indices[sample]))))
        return {name: float(np.mean(values)) for name, values in scores.items()}, draw(lines)


def sampler(setting: StepConfig, mesh: Mesh, guidance: float = 1.0) -> Callable[..., jax.Array]:
    """The compiled function that `sample_held` runs; guidance is an input of models that have it."""
    return jax.jit(functools.partial(_sample, setting=setting, guidance=guidance),
                   out_shardings=NamedSharding(mesh, PartitionSpec()))


def sample_held(run: Callable[..., jax.Array], params: Any, held: Held, batches: Sequence[HeldBatch], steps: int,
                frozen: Any = None) -> dict[int, np.ndarray]:
    """The canvases [bucket, 64] that a model makes of held-out samples, in so many Euler steps from their noise, by
    their places in the table."""
    made: dict[int, np.ndarray] = {}
    for batch in batches:
        sigmas = np.stack([np.asarray(flow.schedule(steps, int(held.table.tokens[sample])))
                           for sample in batch.samples])
        latents = run(params, held.feed(batch, {"sigmas": sigmas}), frozen)
        made |= dict(zip(batch.samples, np.asarray(latents), strict=False))
    return made


def target_unit(row: Row, values: np.ndarray) -> np.ndarray:
    """The target's part of a canvas: values [S or more, 64 or 256] -> [h, w, 16 or 64], in latent cells."""
    return _unit(row, values, -1)


def given(row: Row, decode: Decode) -> list[np.ndarray | None]:
    """What a sample shows, in the grid's columns: references (None or one picture, side by side), edit, what is to be
    changed (None where the two are one), the mask [8h, 8w] uint8 and the target last."""
    references = [decode(_unit(row, row["target"], unit)) for unit in range(int(row["unit"].max()) + 1)]
    mask = _unfold(target_unit(row, row["mask"]))
    pictures = [decode(target_unit(row, row[name])) if name in row else None for name in ("edit", "modify", "target")]
    return [np.concatenate(references, 1) if references else None, *pictures[:2], mask, pictures[2]]


def psnr(target: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """dB `inside` and `outside` a mask [h, w] (above 127 is inside) of pictures [h, w, 3] uint8; a part that has no
    pixel is left out, equal pictures have 100."""
    error = np.square(target.astype(np.float64) - picture).mean(-1)
    parts = {"inside": error[mask > 127], "outside": error[mask <= 127]}
    return {name: min(BEST, 10 * math.log10(255**2 / mean)) if (mean := part.mean()) else BEST
            for name, part in parts.items() if part.size}


def _unit(row: Row, values: np.ndarray, unit: int) -> np.ndarray:
    own = np.flatnonzero(row["unit"] == unit)  # row by row, as the canvas
    rows = len(np.unique(row["positions"][own, 1]))
    height, width = lcu.PATCH * rows, lcu.PATCH * (len(own) // rows)
    return np.asarray(lcu.unpack(jnp.asarray(values[own])[None], height, width)[0])


def _unfold(folded: np.ndarray) -> np.ndarray:
    """The inverse of `acejax.lcu.fold_mask`: [h, w, 64] -> [8h, 8w]."""
    height, width, _ = folded.shape
    cells = folded.reshape(height, width, lcu.CELL, lcu.CELL).transpose(0, 2, 1, 3)
    return cells.reshape(height * lcu.CELL, width * lcu.CELL)


def _sample(params: Any, batch: Batch, frozen: Any, *, setting: StepConfig, guidance: float) -> jax.Array:
    """Latents [B, S, 64] of the whole canvas; a row has `sigmas` [steps + 1] of its own, by its number of tokens."""
    trees = whole(params, frozen)

    def velocity(latents: jax.Array, sigma: jax.Array) -> jax.Array:
        seen = tokens(setting.config, batch, latents, sigma[:, 0, 0], guidance)
        made = apply(setting.config, tokens=seen, execution=setting.execution, **trees)
        return made.astype(jnp.float32)

    return flow.euler(velocity, batch["noise"], batch["sigmas"].T[..., None, None])
