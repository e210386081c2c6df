"""What a run's own data is: samples and tokens, read off the feature cache's index, or else the manifest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from acejax.data import check, manifest
from acejax.data.cache import store
from acejax.data.cache.features import Features
from acejax.data.config import DataConfig, SourceConfig
from acejax.data.layout import CanvasConfig
from acejax.data.sources import open_source
from acejax.errors import UserError

HEADERS = 2000  # lines of a manifest whose pictures are looked at: their headers, not their pixels


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of a run.

    Attributes:
      count: how many.
      tokens: image tokens of those that were looked at, [N]; of all of them where N is `count`. None where nobody
        knows before the features are made (a TFDS dataset).
      origin: where that stands.
      cached: bytes of the feature cache, 0 where there is none yet.
    """

    count: int
    tokens: np.ndarray | None
    origin: str
    cached: int = 0

    @property
    def total(self) -> float | None:
        """Image tokens of all samples, each once."""
        return None if self.tokens is None else self.count * float(np.mean(self.tokens))


def find(config: Mapping[str, Any]) -> Samples | None:
    """The samples of a config's sources; None where one of them is not there, or is no whole dataset.

    Nothing is made or decoded: what is wrong with the data is `acejax data check`'s to tell.
    """
    try:
        data = DataConfig.of(config)
        parts = [_cached(data, name) or _opened(data.canvas, source) for name, source in data.sources.items()]
    except (UserError, OSError):
        return None
    if not parts or not all(part.count for part in parts):
        return None
    known = all(part.tokens is not None for part in parts)
    # a source whose lines were not all looked at stands for itself by repetition: no more than the counts must be right
    tokens = np.concatenate([np.resize(part.tokens, part.count) for part in parts]) if known else None
    origins = ", ".join(dict.fromkeys(part.origin for part in parts))
    return Samples(sum(part.count for part in parts), tokens, origins, max(part.cached for part in parts))


def _cached(data: DataConfig, name: str) -> Samples | None:
    """Of the newest index that a source has in the cache with these canvases."""
    folder = epath.Path(data.cache.dir)
    found = []
    for path in (folder / "index").glob(f"{name}-*.safetensors") if (folder / "index").exists() else ():
        with path.open("rb") as file:
            settings = store.header(file, path)[1]["settings"]
        if settings["dataset"] == name and settings["canvas"] == dataclasses.asdict(data.canvas):
            found.append((path.stat().mtime, path))
    if not found:
        return None
    features = Features(folder, [max(found)[1]])
    shards = folder / "shards"
    nbytes = sum(path.stat().length for path in shards.iterdir()) if shards.exists() else 0
    return Samples(len(features), features.tokens, "the feature cache", nbytes)


def _opened(canvas: CanvasConfig, source: SourceConfig) -> Samples:
    """Of a source whose features are not made yet."""
    opened = open_source(source.path, source.split, source.fields, source.prefix)
    if not isinstance(opened, manifest.Source):
        return Samples(len(opened), None, "the dataset")
    read = manifest.read(source.path, source.fields or manifest.FIELDS, source.prefix)
    rows = read.rows[::-(-len(read.rows) // HEADERS) or 1]
    seen = check.look({path: field == "mask" for row in rows for field, path in row.files})
    rng = np.random.default_rng(0)
    good = [row for row in rows if all(seen[path].size for _, path in row.files)]
    tokens = np.array([check.tokens_of(canvas, row, seen, rng) for row in good], np.int64)
    looked = f"headers of {len(good)} of {len(read.rows)} samples"
    return Samples(len(read.rows), tokens if len(tokens) else None, f"the manifest, {looked}")
