"""The reading side of the cache: a dataset's samples as arrays for the transformer, at random access.

`acejax.data.cache.build.build` tells which index is whose.
"""

import functools
import json
from collections.abc import Sequence

import numpy as np
import xxhash
from etils import epath

from acejax.data.cache import store, tiles
from acejax.data.cache.store import Reader
from acejax.data.cache.survey import EDIT, MASK, MODIFY, REFERENCES, TARGET
from acejax.data.layout import TOKEN
from acejax.errors import UserError

LATENT = 64  # features of a token
MASKED = 256


class Features:
    """Samples of one or several indices, one after the other.

    Attributes:
      tokens: [N] image tokens (of the largest of a sample's variants); `references` [N] their number.
      task, dataset: [N] indices into `tasks` and `datasets`.
      digest: names the samples and all of their features, and their order.

    Raises:
      UserError: an index that is not there any more, or damaged; with `digest`, one of other samples.
    """

    def __init__(self, folder: epath.PathLike, indices: Sequence[epath.PathLike], digest: str | None = None):
        self._parts = [_Part(folder, epath.Path(path)) for path in indices]
        names = [(part.about["settings"]["dataset"], part.about["digest"]) for part in self._parts]
        self.digest = xxhash.xxh3_128_hexdigest(json.dumps(names).encode())
        if digest not in (None, self.digest):
            raise UserError(f"{folder}: the features of {', '.join(name for name, _ in names)} are others than those "
                            f"that were opened before; found the digest {self.digest}, expected {digest}")
        self._given = (folder, tuple(indices), self.digest)
        self._ends = np.cumsum([len(part.index["row"]) for part in self._parts])
        self.tasks = tuple(dict.fromkeys(task for part in self._parts for task in part.about["tasks"]))
        self.datasets = tuple(part.about["settings"]["dataset"] for part in self._parts)
        self._tasks = [np.array([self.tasks.index(task) for task in part.about["tasks"]], np.int32)
                       for part in self._parts]
        self.task = np.concatenate([numbers[part.index["task"]] if len(numbers) else part.index["task"]
                                    for numbers, part in zip(self._tasks, self._parts, strict=True)])
        self.tokens = np.concatenate([part.tokens for part in self._parts])
        self.references = np.concatenate([part.index["references"] for part in self._parts])
        self.dataset = np.repeat(np.arange(len(self._parts), dtype=np.int32), np.diff([0, *self._ends]))

    def __len__(self) -> int:
        return len(self.task)

    def origin(self, index: int) -> tuple[str, int]:
        """The name of a sample's dataset and its place in the source."""
        number, at = self._find(index)
        return self.datasets[number], int(self._parts[number].index["row"][at])

    def fetch(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A sample, not padded.

        Args:
          index: which one.
          rng: draws the variant and whether the prompt is left out; twice, whatever there is to draw.

        Returns:
          `edit`, `modify` (where split) and `target` [S, 64] and `text` [T, D] and `pooled` [P] as stored, `mask`
          [S, 256] uint8 in the order of `acejax.lcu.fold_mask`, `positions` [S, 3] int32, `unit` [S] int8 (references
          0, 1, ..., the target -1), `task` int32.

        Raises:
          UserError: a shard that is not there any more, or damaged.
        """
        number, at = self._find(index)
        part = self._parts[number]
        variant, chance = int(rng.integers(part.variants)), rng.random()
        return part.fetch(at, variant, chance < part.drop) | {"task": self.task[index]}

    def _find(self, index: int) -> tuple[int, int]:
        """The part that a sample is in, and its place there."""
        number = int(np.searchsorted(self._ends, index, "right"))
        return number, index - int(self._ends[number - 1]) if number else index

    def __reduce__(self):
        return Features, self._given


class _Part:
    """One index."""

    def __init__(self, folder: epath.PathLike, path: epath.Path):
        self.index, self.about = store.read(path)
        settings = self.about["settings"]
        self.variants, self.drop = settings["variants"], settings["augment"]["drop_caption"]
        self._dtype, self._split = np.dtype(settings["dtype"]), settings["canvas"]["split"]
        self._reader, self._joined = Reader(folder), self.about["joined"]
        references = self.index["references"].astype(np.int64)
        visits = self.index["height"].shape[1]
        self._per_visit = np.full(len(references), REFERENCES) if self._joined else REFERENCES + 2 * references
        self._starts = np.concatenate([[0], np.cumsum(self._per_visit * visits)])
        self._widths = np.concatenate([[0], np.cumsum(references * visits)])
        ends = np.concatenate([[0], np.cumsum(self.index["widths"], dtype=np.int64)])
        first = self._widths[:-1, None] + references[:, None] * np.arange(visits)
        wide = self.index["width"] + ends[first + references[:, None]] - ends[first]
        self.tokens = (self.index["height"] // TOKEN * (wide // TOKEN)).max(1).astype(np.int32)

    def fetch(self, at: int, variant: int, drop: bool) -> dict[str, np.ndarray]:
        count = int(self.index["references"][at])
        height = int(self.index["height"][at, variant])
        first = self._widths[at] + variant * count
        widths = [*self.index["widths"][first:first + count], self.index["width"][at, variant]]
        first = self._starts[at] + variant * self._per_visit[at]
        numbers = self.index["tiles"][first:first + self._per_visit[at]]
        rows, columns = height // TOKEN, [int(width) // TOKEN for width in widths]
        units = [sum(columns)] if self._joined else columns

        @functools.cache  # a reference serves two fields, grey several
        def tile(number: int, unit: int) -> np.ndarray:
            return self._row(number, (rows, unit, LATENT), self._dtype)

        def field(slot: int, beside: Sequence[int]) -> np.ndarray:
            """A tile of the target, those of the references on its left: [S, 64]."""
            shown = [tile(int(number), unit) for number, unit in zip((*beside, numbers[slot]), units, strict=True)]
            return (shown[0] if len(shown) == 1 else np.concatenate(shown, 1)).reshape(-1, LATENT)

        references = numbers[REFERENCES::2]
        row = {"edit": field(EDIT, references), "target": field(TARGET, references)}
        if self._split:
            row["modify"] = field(MODIFY, numbers[REFERENCES + 1::2])
        unit = np.repeat(np.array([*range(count), -1], np.int8), columns)
        return row | {"mask": self._mask(int(numbers[MASK]), rows, units), "positions": positions(rows, sum(columns)),
                      "unit": np.tile(unit, rows),
                      **self._prompt(int(self.about["empty"] if drop else self.index["prompt"][at]))}

    def _mask(self, number: int, rows: int, units: Sequence[int]) -> np.ndarray:
        """[S, 256]; nothing of the references is generated."""
        if self._joined and number >= 0:
            return self._row(number, (rows, units[-1], MASKED), np.uint8).reshape(-1, MASKED)
        mask = np.zeros((rows, sum(units), MASKED), np.uint8)
        own = mask[:, -units[-1]:]
        own[:] = 255 if number < 0 else tiles.unpack(self._row(number, (rows, units[-1], MASKED // 8), np.uint8))
        return mask.reshape(-1, MASKED)

    def _prompt(self, number: int) -> dict[str, np.ndarray]:
        length, width, pooled = self.about["text_shape"]
        row = self._row(number, (length * width + pooled,), self._dtype)
        return {"text": row[:length * width].reshape(length, width), "pooled": row[length * width:]}

    def _row(self, number: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        shard = self.about["shards"][self.index["shard"][number]]
        return self._reader.read(shard, int(self.index["start"][number]), shape, dtype)


def positions(rows: int, columns: int) -> np.ndarray:
    """As `acejax.lcu.positions`, without jax: [rows columns, 3] int32."""
    grid = np.zeros((rows, columns, 3), np.int32)
    grid[..., 1] = np.arange(rows)[:, None]
    grid[..., 2] = np.arange(columns)
    return grid.reshape(-1, 3)
