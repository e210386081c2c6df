"""The training stream: the batch of every step, of one shape a bucket, the same on all hosts, each with its own rows.

A batch depends on the seed and the step alone (`acejax.data.schedule`), so an interrupted run goes on exactly where it
was, on any number of hosts and workers.
"""

import collections
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from acejax.data import buckets as token_buckets
from acejax.data.schedule import Draw, Samples, Schedule, Stage
from acejax.errors import UserError

Row = dict[str, Any]
TRIES = 20  # samples tried in place of a broken one
ENOUGH = 200  # samples seen before a share of broken ones is judged
PAD_UNIT = -2


class Broken(UserError):
    """A sample that can't be used: it is skipped, counted and reported."""


class Table(Protocol):
    """Samples at random access: `acejax.data.cache.features.Features`, `acejax.data.online.Pictures`.

    Attributes:
      tokens, references, task, dataset: [N] arrays; `tasks` and `datasets` name what the last two count.
    """

    tokens: np.ndarray
    references: np.ndarray
    task: np.ndarray
    tasks: Sequence[str]
    dataset: np.ndarray
    datasets: Sequence[str]

    def __len__(self) -> int: ...

    def fetch(self, index: int, rng: np.random.Generator) -> Row:
        """A sample; `rng` draws what may differ at each visit. Raises Broken."""
        ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's samples.

    Attributes:
      bucket: image tokens of a row, padding included.
      arrays: this process's rows. With features: `edit`, `modify` (where split), `target` [B, S, 64], `mask`
        [B, S, 256] uint8, `positions` [B, S, 3], `unit` [B, S] int8 (-1 the target, -2 padding), `lengths` [B], `text`
        [B, T, D], `pooled` [B, P], `task` [B]. What is no array is a list.
      skipped: why samples were skipped for it.
    """

    bucket: int
    arrays: dict[str, Any]
    skipped: tuple[str, ...] = ()


class Stream:
    """`stream[step]` is that step's Batch.

    Args:
      table: the samples.
      stages: one after the other; the last one goes on for ever.
      buckets: token counts that samples are padded to (`acejax.data.buckets.choose`).
      batch_sizes: samples of a batch, over all processes, for each bucket.
      seed: of order and draws.
      max_broken: the share of broken samples that stops the run.

    Attributes:
      tasks: their names; a batch's `task` is an index into them.
      references: the most references that a sample has.

    Raises:
      UserError: as `Schedule`; a sample beyond the greatest bucket.
    """

    def __init__(self, table: Table, stages: Sequence[Stage], buckets: Sequence[int], batch_sizes: Mapping[int, int],
                 seed: int, max_broken: float = 0.01):
        if not len(table):
            raise UserError("there is no sample to train on")
        if (most := int(np.max(table.tokens))) > max(buckets):
            raise UserError(f"a sample has {most} tokens; the greatest bucket is {max(buckets)}")
        self.table, self.tasks, self.batch_sizes = table, tuple(table.tasks), dict(batch_sizes)
        self.references = int(np.max(table.references))
        samples = Samples(table.task, table.tasks, table.dataset, table.datasets, table.references,
                          token_buckets.assign(table.tokens, sorted(buckets)))
        self.schedule = Schedule(samples, stages, batch_sizes, seed)
        self._seed, self._max_broken = seed, max_broken
        self._parts, self._count = (0,), 1

    def share(self, parts: Sequence[int], count: int) -> "Stream":
        """The same batches, cut into `count` equal parts, of which `parts` are read (`acejax.parallel.batch`)."""
        stream = copy.copy(self)
        stream._parts, stream._count = tuple(parts), count
        return stream

    def __getitem__(self, step: int) -> Batch:
        return self._batch(self.schedule[step])

    def examples(self, start: int, stop: int) -> dict[int, dict[str, Any]]:
        """Arrays of each bucket that the steps from `start` to before `stop` may meet, for compiling."""
        return {bucket: self._batch(draw).arrays for bucket, draw in self.schedule.buckets(start, stop).items()}

    def batches(self, start: int, stop: int, threads: int = 2, ahead: int = 4, workers: int = 0) -> Iterator[Batch]:
        """The batches of steps `start` to before `stop`, made ahead by threads, or by processes (`workers`).

        Raises:
          UserError: too many broken samples.
        """
        steps = grain.MapDataset.range(start, stop).map(self.__getitem__)
        reading = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        if workers:
            if not flags.FLAGS.is_parsed():  # grain's workers look at them
                flags.FLAGS(["acejax"], known_only=True)
            reading = reading.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        seen, broken = 0, collections.deque(maxlen=3)
        count = 0
        for batch in reading:
            seen += len(batch.arrays["task"])
            count += len(batch.skipped)
            broken.extend(batch.skipped)
            if seen >= ENOUGH and count > self._max_broken * seen:
                raise UserError(f"{count} of {seen} samples are broken, more than the share of {self._max_broken:g} "
                                f"that is let pass; the last: {'; '.join(broken)}")
            yield batch

    def _batch(self, draw: Draw) -> Batch:
        size = self.batch_sizes[draw.bucket] // self._count
        skipped: list[str] = []
        rows = [self._row(draw, part * size + row, skipped) for part in self._parts for row in range(size)]
        return Batch(draw.bucket, collate(rows, draw.bucket), tuple(skipped))

    def _row(self, draw: Draw, row: int, skipped: list[str]) -> Row:
        rng = np.random.default_rng((self._seed, draw.stage, draw.bucket, draw.start + row))
        for _ in range(TRIES):
            try:
                return self.table.fetch(self.schedule.sample(draw, row), rng)
            except Broken as error:
                skipped.append(str(error))
                row = int(rng.integers(2**40))  # another one of the bucket
        raise UserError(f"{TRIES} samples one after the other are broken; the last: {skipped[-1]}")


def collate(rows: Sequence[Row], bucket: int) -> dict[str, Any]:
    """Rows of S_i tokens each -> arrays of `bucket` tokens, padded with zeros at the end, with their `lengths`."""
    lengths = [len(row["positions"]) for row in rows if "positions" in row]
    batch: dict[str, Any] = {"lengths": np.array(lengths, np.int32)} if lengths else {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if name in _TOKENS:
            batch[name] = np.empty((len(rows), bucket, *first.shape[1:]), first.dtype)
            for padded, value in zip(batch[name], values, strict=True):
                padded[:len(value)] = value
                padded[len(value):] = PAD_UNIT if name == "unit" else 0
        else:
            batch[name] = np.stack(values) if isinstance(first, np.ndarray | np.generic) else values
    return batch


_TOKENS = ("edit", "modify", "target", "noise", "mask", "positions", "unit")


def batch_sizes(buckets: Sequence[int], tokens: int, multiple: int = 1) -> dict[int, int]:
    """Samples of a batch for each bucket: as many as `tokens` hold, a multiple of the parts that it falls into.

    Raises:
      UserError: not a sample for each device.
    """
    if tokens < (least := max(buckets) * multiple):
        raise UserError(f"data.batch_tokens is {tokens}; expected at least {least}, a sample of {max(buckets)} tokens "
                        f"for each of {multiple} parts (data x fsdp devices, times config.optimizer.accumulate)")
    return {bucket: tokens // bucket // multiple * multiple for bucket in buckets}
