"""The training stream: which batch every step sees, as a pure function of the step.

A step's bucket (canvas size) and its samples depend on the seed and the step alone, so all hosts agree, an interrupted
run goes on exactly where it was, and nothing but the step has to be saved.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import jax
import numpy as np

from acejax.data.tabulate import Features
from acejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run: `steps` steps with tasks drawn by these weights."""

    steps: int
    weights: Mapping[str, float]


class Stream:
    """`stream[step]` is that step's (bucket, batch): numpy arrays, this process's share of the samples.

    Args:
      tables: features of each task (`acejax.data.tabulate.tabulate`).
      stages: one after the other; the last one goes on for ever.
      batch_sizes: samples of a batch for each bucket; a bucket is the width of the canvas in latent pixels.
      seed: of order and draws.

    Attributes:
      tasks: their names; a batch's `task` is an index into them.
      references: the most references that a sample has.

    Raises:
      UserError: a stage that names a task without samples.
    """

    def __init__(self, tables: Mapping[str, Features], stages: Sequence[Stage], batch_sizes: Mapping[int, int],
                 seed: int):
        self.tasks = tuple(tables)
        for stage in stages:
            missing = [task for task, weight in stage.weights.items() if weight > 0 and task not in tables]
            if missing:
                raise UserError(f"the stream has no samples of {', '.join(missing)}; it has {', '.join(tables)}")
        self._stages, self._seed, self.batch_sizes = stages, seed, batch_sizes
        self.references = max(int(table["unit"].max()) + 1 for table in tables.values())
        self._buckets = {task: int(table["target"].shape[2]) for task, table in tables.items()}
        self._sources = [self._mixtures(number, stage, tables) for number, stage in enumerate(stages)]
        self._plans = [self._plan(number, stage) for number, stage in enumerate(stages)]

    def __getitem__(self, step: int) -> tuple[int, dict[str, np.ndarray]]:
        number, start = self._stage(step)
        cycle, at = divmod(step - start, len(self._plans[number][0]))
        chosen, before = self._plans[number]
        bucket = int(chosen[at])
        index = cycle * int((chosen == bucket).sum()) + int(before[at])  # how often the bucket came before
        return bucket, self._batch(number, bucket, index)

    def examples(self, start: int, stop: int) -> dict[int, dict[str, np.ndarray]]:
        """A batch of each bucket that the steps from `start` to before `stop` may meet, for compiling."""
        stages = range(self._stage(start)[0], self._stage(max(start, stop - 1))[0] + 1)
        return {bucket: self._batch(number, bucket, 0) for number in stages for bucket in self._sources[number]}

    def _stage(self, step: int) -> tuple[int, int]:
        """The stage that a step belongs to, and its first step."""
        number, start = 0, 0
        while number + 1 < len(self._stages) and step >= start + self._stages[number].steps:
            start, number = start + self._stages[number].steps, number + 1
        return number, start

    def _batch(self, number: int, bucket: int, index: int) -> dict[str, np.ndarray]:
        size = self.batch_sizes[bucket]
        share = np.array_split(np.arange(size), jax.process_count())[jax.process_index()]  # this process's rows
        rows = [self._sources[number][bucket][index * size + int(i)] for i in share]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _mixtures(self, number: int, stage: Stage, tables: Mapping[str, Features]) -> dict[int, grain.MapDataset]:
        """For each bucket an endless, seeded, shuffled mixture of its tasks."""
        mixtures = {}
        for bucket in sorted({self._buckets[task] for task, weight in stage.weights.items() if weight > 0}):
            tasks = [task for task, weight in stage.weights.items() if weight > 0 and self._buckets[task] == bucket]
            parts = [grain.MapDataset.source(_Rows(tables[task], self.tasks.index(task)))
                     .seed(self._seed + 1000 * number + self.tasks.index(task)).shuffle().repeat() for task in tasks]
            mixtures[bucket] = grain.MapDataset.mix(parts, weights=[stage.weights[task] for task in tasks])
        return mixtures

    def _plan(self, number: int, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each of 10,000 steps (repeated after that), and how often it came before within them."""
        buckets = list(self._sources[number])
        share = np.array([sum(weight for task, weight in stage.weights.items() if self._buckets[task] == bucket)
                          for bucket in buckets])
        chosen = np.random.default_rng([self._seed, number]).choice(buckets, size=10_000, p=share / share.sum())
        before = np.zeros_like(chosen)
        for bucket in buckets:
            before[chosen == bucket] = np.arange((chosen == bucket).sum())
        return chosen, before


class _Rows:
    """A task's features as a random-access source of samples."""

    def __init__(self, table: Features, task: int):
        self._table, self._task = table, np.int32(task)

    def __len__(self) -> int:
        return len(self._table["target"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: values[index] for name, values in self._table.items()} | {"task": self._task}
