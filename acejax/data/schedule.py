"""Which samples each step sees, as a pure function of the step: nothing has to be saved but the step.

Every sample of a stage lies in one bucket. A *cycle* is as many samples as the stage has: without weights an epoch. It
has each bucket as often as its samples fill a batch (what is left over is carried into the next cycle), in an order
that the seed shuffles; all hosts compute the same. Within a bucket every sample is seen once before any is seen again.
"""

import dataclasses
import fnmatch
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from acejax.errors import UserError

FEW = 2**14  # up to here grain's shuffle, which holds no list, is slow: 12 ms a sample of ten


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
      steps: its length; the last stage goes on for ever.
      weights: shares of the samples by task, or by `dataset/task` with `*` for anything; the first name that fits
        counts, what fits none is left out. None: each sample as often as another.
      references: the most references of a sample: 0 is the paper's first stage; None is no limit.
    """

    steps: int
    weights: Mapping[str, float] | None = None
    references: int | None = None


class Samples(NamedTuple):
    """What a schedule knows of samples: arrays [N], the names that `task` and `dataset` count, and the bucket."""

    task: np.ndarray
    tasks: Sequence[str]
    dataset: np.ndarray
    datasets: Sequence[str]
    references: np.ndarray
    bucket: np.ndarray


class Draw(NamedTuple):
    """A step: its stage, its bucket, and where its batch starts in that bucket's endless order."""

    stage: int
    bucket: int
    start: int


class Schedule:
    """`schedule[step]` is a Draw; `schedule.sample(draw, row)` the index of the sample in a row of its batch.

    Args:
      samples: all there are.
      stages: one after the other.
      batch_sizes: samples of a batch by bucket.
      seed: of every order.

    Raises:
      UserError: a stage without samples or with fewer than any of its batches has, or a weight that no sample has or
        that is no positive number.
    """

    def __init__(self, samples: Samples, stages: Sequence[Stage], batch_sizes: Mapping[int, int], seed: int):
        self._stages = stages
        self._parts = [_Part(samples, stage, batch_sizes, seed, number) for number, stage in enumerate(stages)]

    def __getitem__(self, step: int) -> Draw:
        number, start = self._stage(step)
        return Draw(number, *self._parts[number].batch(step - start))

    def sample(self, draw: Draw, row: int) -> int:
        return int(self._parts[draw.stage].orders[draw.bucket][draw.start + row])

    def buckets(self, start: int, stop: int) -> dict[int, Draw]:
        """The buckets that the steps from `start` to before `stop` may meet, each with a batch."""
        stages = range(self._stage(start)[0], self._stage(max(start, stop - 1))[0] + 1)
        return {bucket: Draw(number, bucket, 0) for number in stages for bucket in self._parts[number].orders}

    def epoch(self, stage: int) -> float:
        """Steps in which a stage draws as many samples as it has."""
        part = self._parts[stage]
        return float(part.rates.sum() / part.epochs)

    def _stage(self, step: int) -> tuple[int, int]:
        """The stage that a step belongs to, and its first step."""
        number, start = 0, 0
        while number + 1 < len(self._stages) and step >= start + self._stages[number].steps:
            start, number = start + self._stages[number].steps, number + 1
        return number, start


class _Part:
    """One stage: for each bucket its samples' order and how many batches of it a cycle has."""

    def __init__(self, samples: Samples, stage: Stage, batch_sizes: Mapping[int, int], seed: int, number: int):
        allowed = np.ones(len(samples.task), bool)
        if stage.references is not None:
            allowed = samples.references <= stage.references
        groups = _groups(samples, stage, allowed, number)
        total = sum(weight for weight, _ in groups)
        self._seed, self._sizes = (seed, number), batch_sizes
        self.orders, rates = {}, []
        count = sum(len(index) for _, index in groups)
        for bucket in sorted(map(int, np.unique(np.concatenate([samples.bucket[index] for _, index in groups])))):
            parts, shares = [], []
            for turn, (weight, index) in enumerate(groups):
                inside = index[samples.bucket[index] == bucket]
                if len(inside):
                    parts.append(_endless(inside, _seed(seed, number, bucket, turn)))
                    shares.append(weight / total * len(inside) / len(index))
            self.orders[bucket] = grain.MapDataset.mix(parts, weights=shares) if len(parts) > 1 else parts[0]
            rates.append(count * sum(shares) / batch_sizes[bucket])
        size, bucket = min((batch_sizes[bucket], bucket) for bucket in self.orders)
        if count < size:
            raise UserError(f"stage {number + 1} has {count} samples, fewer than a batch: {size} of {bucket} tokens; "
                            "expected more samples, or a smaller data.batch_tokens or data.batch_sizes")
        self._buckets = np.array(list(self.orders))
        # few samples may fill no batch: then a cycle is as many epochs as surely fill one
        self.epochs = max(1, int(np.ceil((1 + len(rates)) / sum(rates))))
        self.rates = np.array(rates) * self.epochs  # batches of each bucket in a cycle
        self._cycle = functools.lru_cache(2)(self._make_cycle)

    def batch(self, step: int) -> tuple[int, int]:
        """The bucket of a step of the stage, and the first row of its batch in the bucket's order."""
        cycle = int(step / self.rates.sum())
        while self._before(cycle).sum() > step:
            cycle -= 1
        while self._before(cycle + 1).sum() <= step:
            cycle += 1
        place, turn = self._cycle(cycle)
        before = self._before(cycle)
        at = step - int(before.sum())
        bucket = int(self._buckets[place[at]])
        return bucket, int(before[place[at]] + turn[at]) * self._sizes[bucket]

    def _before(self, cycle: int) -> np.ndarray:
        """Whole batches of each bucket before a cycle."""
        return np.floor(cycle * self.rates + 1e-9).astype(np.int64)

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """For each step of a cycle the place of its bucket, and how often that came before in the cycle."""
        counts = self._before(cycle + 1) - self._before(cycle)
        place = np.random.default_rng((*self._seed, cycle)).permutation(np.repeat(np.arange(len(counts)), counts))
        turn = np.zeros_like(place)
        for i, count in enumerate(counts):
            turn[place == i] = np.arange(count)
        return place, turn

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_cycle"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._cycle = functools.lru_cache(2)(self._make_cycle)


def _groups(samples: Samples, stage: Stage, allowed: np.ndarray, number: int) -> list[tuple[float, np.ndarray]]:
    """(weight, indices) of what is drawn together."""
    if stage.weights is None:
        groups = [(1.0, np.flatnonzero(allowed))]
    else:
        names = [f"{dataset}/{task}" for dataset in samples.datasets for task in samples.tasks]
        kind = samples.dataset * len(samples.tasks) + samples.task
        left, groups = set(range(len(names))), []
        for pattern, weight in stage.weights.items():
            if not 0 <= weight < np.inf:
                raise UserError(f"stage {number + 1}: the weight of {pattern!r} is {weight!r}; expected 0 or more")
            found = left.intersection(fits(pattern, names))
            left -= found
            index = np.flatnonzero(np.isin(kind, list(found)) & allowed)
            if weight and not len(index):
                raise UserError(f"stage {number + 1}: no samples of {pattern!r}; there are "
                                f"{', '.join(sorted({names[i] for i in np.unique(kind[allowed])})) or 'none'}")
            if weight:
                groups.append((float(weight), index))
    if not groups or not len(groups[0][1]):
        raise UserError(f"stage {number + 1} has no samples" + (
            "" if stage.references is None else f" with at most {stage.references} references"))
    return groups


def fits(pattern: str, names: Sequence[str]) -> list[int]:
    """Which `dataset/task` a weight's name stands for: that itself, or a task of any dataset."""
    return [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name if "/" in pattern else
                                                                     name.partition("/")[2], pattern)]


def _endless(index: np.ndarray, seed: int) -> grain.MapDataset:
    """Each once an epoch, in an order of the epoch's own."""
    if len(index) > FEW:
        return grain.MapDataset.source(index).seed(seed).shuffle().repeat()
    return grain.MapDataset.range(sys.maxsize).map(functools.partial(_shuffled, index, seed))


def _shuffled(index: np.ndarray, seed: int, place: int) -> int:
    epoch, at = divmod(place, len(index))
    return index[_permutation(seed, epoch, len(index))[at]]


@functools.lru_cache(64)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def _seed(*numbers: int) -> int:
    """One 32-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
