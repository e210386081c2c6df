"""The index of a dataset: for every sample its layout and where each of its rows lies in the store.

It carries in full the settings that it was made with, a digest of all that it speaks of and what its source said of
itself then. The first two are in its name as well: data that changes gets an index beside the old one, and who reads
that goes on with what it has.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from etils import epath

from acejax.data.cache import store
from acejax.data.cache.survey import Survey

Settings = Mapping[str, Any]
ARRAYS = ("row", "task", "references", "height", "width", "widths")  # of a survey


def digest(survey: Survey) -> str:
    """Of samples, layouts, tiles and prompts: the same for data that trains alike, wherever its files are."""
    hashed = xxhash.xxh3_128(json.dumps(list(survey.tasks)).encode())
    for name in (*ARRAYS, "keys", "prompt"):
        array = getattr(survey, name)
        hashed.update(f"{name}{array.shape}".encode())
        hashed.update(np.ascontiguousarray(array))
    return hashed.hexdigest()


def place(folder: epath.PathLike, settings: Settings, survey: Survey) -> epath.Path:
    """Where the index of these settings and samples is, or would be."""
    return _beside(folder) / f"{_name(settings)}-{digest(survey)[:16]}.safetensors"


def write(path: epath.Path, survey: Survey, numbers: np.ndarray, prompts: np.ndarray, empty: int, table: store.Table,
          settings: Settings, **more: Any) -> int:
    """Write a dataset's index; returns its bytes.

    Args:
      path: as by `place`.
      survey: samples whose features are all in the store.
      numbers: [E] the place in `table` of each of the survey's keys, -1 where there is no tile.
      prompts: [M] of each prompt; `empty` of the empty one, -1 where it isn't needed.
      table: the store's.
      settings: of the dataset and everything that was applied to it.
      more: what else is kept with it.
    """
    used = np.unique(np.concatenate([numbers, prompts, [empty]]))
    used = used[used >= 0]
    shards, shard = np.unique(table.shard[used], return_inverse=True)

    def renumbered(old: np.ndarray) -> np.ndarray:
        return np.where(old < 0, -1, np.searchsorted(used, old)).astype(np.int32)

    arrays = {name: getattr(survey, name) for name in ARRAYS}
    arrays |= {"tiles": renumbered(numbers), "prompt": renumbered(prompts), "shard": shard.astype(np.int32),
               "start": table.start[used], "key": np.ascontiguousarray(table.keys[used]).view("<u8").reshape(-1, 2)}
    about = {"settings": settings, "tasks": list(survey.tasks), "shards": [table.shards[i] for i in shards],
             "empty": int(renumbered(np.array(empty))), "text_shape": _text_shape(table, prompts),
             "joined": survey.joined, "skipped": [list(one) for one in survey.skipped], "digest": digest(survey)}
    return store.write(path, arrays, about | more)


def find(folder: epath.PathLike, settings: Settings, identity: str, shards: Collection[str]
         ) -> tuple[epath.Path, dict[str, Any]] | None:
    """The index of these settings whose source was the same and whose shards are all there, with what it says."""
    for path, about in _all(folder, settings):
        if about["settings"] == settings and about["identity"] == identity and set(shards).issuperset(about["shards"]):
            return path, about
    return None


def nearest(folder: epath.PathLike, settings: Settings) -> list[str]:
    """What differs from the settings of the dataset's nearest index; nothing where there is none."""
    others = [_differences(settings, about["settings"]) for _, about in _all(folder, settings)]
    return min(others, key=len, default=[])


def _name(settings: Settings) -> str:
    text = json.dumps(settings, sort_keys=True).encode()
    return re.sub(r"[^\w.-]+", "_", settings["dataset"]) + "-" + xxhash.xxh3_64_hexdigest(text)


def _beside(folder: epath.PathLike) -> epath.Path:
    return epath.Path(folder) / "index"


def _all(folder: epath.PathLike, settings: Settings) -> Iterator[tuple[epath.Path, dict[str, Any]]]:
    """The dataset's indices, of any settings."""
    folder = _beside(folder)
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if not path.name.startswith(".") and path.name.endswith(".safetensors"):
            with path.open("rb") as file:
                about = store.header(file, path)[1]
            if about["settings"]["dataset"] == settings["dataset"] and "identity" in about:  # older ones have none
                yield path, about


def _differences(wanted: Any, found: Any, name: str = "") -> list[str]:
    """Fields that differ, with what is wanted and what was found."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return [line for field in sorted({*wanted, *found})
                for line in _differences(wanted.get(field), found.get(field), f"{name}.{field}" if name else field)]
    return [] if wanted == found else [f"{name} is {wanted!r}, was {found!r}"]


def _text_shape(table: store.Table, prompts: np.ndarray) -> list[int]:
    """(T, D, P), which the kind of their rows names."""
    kinds = [table.kinds[kind] for kind in np.unique(table.kind[prompts])]
    if len(kinds) > 1:
        raise ValueError(f"prompts of one encoder have features of several shapes: {kinds}")
    return [int(extent) for kind in kinds for extent in kind.split(".")[1].split("x")]
