"""Samples decoded while training goes on: canvases for the stream, without a cache."""

import concurrent.futures
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from acejax.data import prepare
from acejax.data.augment import AugmentConfig
from acejax.data.layout import CanvasConfig
from acejax.data.prepare import Plan
from acejax.data.sample import Sample
from acejax.data.stream import Broken
from acejax.errors import UserError

CHUNK = 1024  # headers in flight


class Pictures:
    """A table (`acejax.data.stream.Table`) whose rows are `canvas`, `prompt` and `task`.

    Args:
      source: the samples.
      config, augment: how they become canvases. What a canvas' size depends on is drawn once for each row, from the
        seed; mask and caption at each visit.
      seed: of the sizes.
      name: of the source, for weights by dataset.

    Attributes:
      skipped: samples whose headers can't be read, and why; they are not in the table.
    """

    def __init__(self, source: Sequence[Sample], config: CanvasConfig, augment: AugmentConfig = AugmentConfig(),
                 seed: int = 0, name: str = "pictures", progress: bool = False):
        self._source, self._config, self._augment = source, config, augment
        self.datasets, self.skipped = (name,), []
        self._index, self._layouts, tasks = [], [], []

        def planned(index: int) -> tuple[str, Plan] | str:
            try:
                sample, rng = source[index], np.random.default_rng((seed, index))
                return sample.task, prepare.plan(sample, config, augment, rng)
            except UserError as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for start in tqdm(range(0, len(source), CHUNK), "headers", unit_scale=CHUNK, disable=not progress):
                indices = range(start, min(start + CHUNK, len(source)))
                for index, found in zip(indices, pool.map(planned, indices), strict=True):
                    if isinstance(found, str):
                        self.skipped.append(found)
                        continue
                    tasks.append(found[0])
                    self._index.append(index)
                    self._layouts.append(found[1].layout)
        self.tasks = tuple(dict.fromkeys(tasks))
        number = {task: i for i, task in enumerate(self.tasks)}
        self.task = np.array([number[task] for task in tasks], np.int32)
        self.dataset = np.zeros(len(tasks), np.int32)
        self.tokens = np.array([layout.tokens for layout in self._layouts])
        self.references = np.array([len(layout.widths) - 1 for layout in self._layouts])

    def __len__(self) -> int:
        return len(self._index)

    def fetch(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The canvas of a row; Broken where a picture can't be decoded."""
        try:
            sample = self._source[self._index[index]]
            drawn = prepare.visit(sample, self._layouts[index], self._augment, rng)
            canvas = prepare.compose(sample, self._config, drawn)
        except UserError as error:
            raise Broken(str(error)) from error
        return {"canvas": canvas, "prompt": "" if drawn.drop else sample.prompt, "task": self.task[index]}
