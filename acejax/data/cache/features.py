"""The reading side of the cache: a dataset's samples as arrays for the transformer, at random access.

An index says for every sample its layout and where each of its rows lies in the store. It carries the settings that it
was made with, in full, and is found by them: no index of other settings is ever taken.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from etils import epath

from acejax.data.cache import store, tiles
from acejax.data.cache.store import Reader
from acejax.data.cache.survey import EDIT, MASK, MODIFY, REFERENCES, TARGET, Survey
from acejax.data.layout import TOKEN
from acejax.errors import UserError

Settings = Mapping[str, Any]
LATENT = 64  # features of a token
MASKED = 256
MAKE = "make them with `acejax data cache`"


def index_path(folder: epath.PathLike, settings: Settings) -> epath.Path:
    """Where the index of these settings is, or would be."""
    name = re.sub(r"[^\w.-]+", "_", settings["dataset"])
    text = json.dumps(settings, sort_keys=True).encode()
    return epath.Path(folder) / "index" / f"{name}-{xxhash.xxh3_64_hexdigest(text)}.safetensors"


def write_index(path: epath.Path, survey: Survey, numbers: np.ndarray, prompts: np.ndarray, empty: int,
                table: store.Table, settings: Settings) -> int:
    """Write a dataset's index; returns its bytes.

    Args:
      path: as by `index_path`.
      survey: samples whose features are all in the store.
      numbers: [E] the place in `table` of each of the survey's keys, -1 where there is no tile.
      prompts: [M] of each prompt; `empty` of the empty one, -1 where it isn't needed.
      table: the store's.
      settings: of the dataset and everything that was applied to it.
    """
    used = np.unique(np.concatenate([numbers, prompts, [empty]]))
    used = used[used >= 0]
    shards, shard = np.unique(table.shard[used], return_inverse=True)

    def renumbered(old: np.ndarray) -> np.ndarray:
        return np.where(old < 0, -1, np.searchsorted(used, old)).astype(np.int32)

    arrays = {name: getattr(survey, name) for name in ("row", "task", "references", "height", "width", "widths")}
    arrays |= {"tiles": renumbered(numbers), "prompt": renumbered(prompts), "shard": shard.astype(np.int32),
               "start": table.start[used], "key": np.ascontiguousarray(table.keys[used]).view("<u8").reshape(-1, 2)}
    about = {"settings": settings, "tasks": list(survey.tasks), "shards": [table.shards[i] for i in shards],
             "empty": int(renumbered(np.array(empty))), "text_shape": _text_shape(table, prompts),
             "joined": survey.joined, "skipped": [list(one) for one in survey.skipped]}
    return store.write(path, arrays, about)


def _text_shape(table: store.Table, prompts: np.ndarray) -> list[int]:
    """(T, D, P), which the kind of their rows names."""
    kinds = [table.kinds[kind] for kind in np.unique(table.kind[prompts])]
    if len(kinds) > 1:
        raise ValueError(f"prompts of one encoder have features of several shapes: {kinds}")
    return [int(extent) for kind in kinds for extent in kind.split(".")[1].split("x")]


class Features:
    """Samples of one or several indices, one after the other.

    Attributes:
      tokens: [N] image tokens (of the largest of a sample's variants); `references` [N] their number.
      task, dataset: [N] indices into `tasks` and `datasets`.
    """

    def __init__(self, folder: epath.PathLike, indices: Sequence[epath.PathLike]):
        self._given = (folder, tuple(indices))
        self._parts = [_Part(folder, epath.Path(path)) for path in indices]
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

    @classmethod
    def open(cls, folder: epath.PathLike, settings: Sequence[Settings]) -> "Features":
        """The features of datasets with these settings (`acejax.data.cache.build.settings`).

        Raises:
          UserError: no such features; it says what those that are there differ in.
        """
        return cls(folder, [_find(folder, one) for one in settings])

    def __len__(self) -> int:
        return len(self.task)

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
        number = int(np.searchsorted(self._ends, index, "right"))
        part = self._parts[number]
        at = index - int(self._ends[number - 1]) if number else index
        variant, chance = int(rng.integers(part.variants)), rng.random()
        return part.fetch(at, variant, chance < part.drop) | {"task": self.task[index]}

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


def _find(folder: epath.PathLike, settings: Settings) -> epath.Path:
    """The index of these settings."""
    path = index_path(folder, settings)
    if path.exists():
        with path.open("rb") as file:
            if store.header(file, path)[1]["settings"] == settings:
                return path
    others = []
    if path.parent.exists():
        for other in sorted(path.parent.iterdir()):
            if other.name.endswith(".safetensors") and other.name[:-len(path.suffix)][:-17] == path.stem[:-17]:
                with other.open("rb") as file:
                    others.append(_differences(settings, store.header(file, other)[1]["settings"]))
    if not others:
        raise UserError(f"{folder}: no features of {settings['dataset']!r}; {MAKE}")
    nearest = min(others, key=len)
    raise UserError(f"{folder}: no features of {settings['dataset']!r} with these settings; {MAKE}. The nearest that "
                    f"are there differ in {'; '.join(nearest)}")


def _differences(wanted: Any, found: Any, name: str = "") -> list[str]:
    """Fields that differ, with what was found and what is wanted."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return [line for field in sorted({*wanted, *found})
                for line in _differences(wanted.get(field), found.get(field), f"{name}.{field}" if name else field)]
    return [] if wanted == found else [f"{name} ({found!r}; expected {wanted!r})"]
