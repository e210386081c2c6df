"""Watching a run: what its steps tell, its validation and its speed, written down where the config asks for it."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from acejax.data.stream import Batch
from acejax.train import lora
from acejax.train.bad_steps import BadSteps
from acejax.train.config import TrainConfig
from acejax.train.meter import Meter, memory
from acejax.train.metrics import Writer, summarize
from acejax.train.optimizer import learning_rate
from acejax.train.step import TrainState
from acejax.train.validate import Validation

AHEAD = 2  # steps that are sent off before their devices have come to them


class Watch:
    """Sees every step; nothing is fetched from the devices but where a report is due.

    The host stays close to the devices: what is sent off can't be taken back when the machine is, and its batches take
    memory.

    Args:
      run: of which `watch` and `validation` say what is due when.
      workdir: gets metrics.jsonl, samples/ and TensorBoard files.
      tasks: their names.
      start, skipped: steps done, and how many of them were skipped.
      validation: of held-out samples, where there are any.
    """

    def __init__(self, run: TrainConfig, workdir: epath.PathLike, tasks: Sequence[str], start: int = 0,
                 skipped: int = 0, validation: Validation | None = None):
        self._run, self._tasks, self._validation = run, tasks, validation
        self._writer = Writer(workdir, start)
        self.meter = Meter.of(run.model, run.lora and lora.pairs(run.lora, run.model))
        self._bad = BadSteps(run.watch.bad_steps, tasks, skipped)
        self._rate = jax.jit(learning_rate(run.optimizer, run.steps))
        self._waiting: list[dict[str, jax.Array]] = []

    @property
    def seconds(self) -> float:
        """Of training, up to the last report."""
        return self._writer.seconds + self.meter.seconds

    def step(self, metrics: dict[str, jax.Array], batch: Batch, rows: int) -> None:
        """A step has been sent off: what it will tell, this process's part of its batch, and the samples of it all."""
        self._waiting.append(metrics)
        jax.block_until_ready(self._waiting[:-AHEAD][-1:])
        self.meter.add(rows, batch.arrays["text"].shape[1], batch.bucket, batch.arrays["lengths"])

    def report(self, done: int, state: TrainState, last: bool = False, judge: bool = True) -> dict[str, float]:
        """Write down what is due after `done` steps; `last` asks for an interval's averages, as the run stops there.
        Without `judge` nothing is validated: a machine that is wanted back leaves no time.

        Returns:
          What was written, by name (`acejax.train.metrics`).

        Raises:
          UserError: too many skipped steps, or files that can't be written.
        """
        values: dict[str, float] = {}
        if last or done % self._run.watch.every == 0:
            steps, self._waiting = jax.device_get(self._waiting), []
            values |= summarize(steps, self._tasks) | {"learning_rate": float(self._rate(done - 1))}
            values |= self.meter.read() | memory() | {"seconds": self.seconds}
            self._bad.look(steps, done)
        if self._validation is not None and judge:
            values |= self._validate(done, state.params if state.ema is None else state.ema, state.step)
        if values:
            self._writer.write(done, values)
        return values

    def _validate(self, done: int, params: Any, running: jax.Array) -> dict[str, float]:
        config, values, picture = self._run.validation, {}, None

        losses, samples = (every > 0 and (done % every == 0 or done == self._run.steps)
                           for every in (config.every, config.grid_every))
        if not losses and not samples:
            return values
        with self.meter.aside(running):
            if losses:
                values |= self._validation.losses(params)
            if samples:
                scores, picture = self._validation.samples(params)
                values |= scores
            if picture is not None:
                self._writer.picture(done, picture)
        return values

    def close(self) -> None:
        self._writer.close()
