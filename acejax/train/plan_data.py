"""What a run's own data is: samples and tokens, read off the feature cache's index, or else the manifest."""

import dataclasses
import json
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
      tokens: image tokens of each, [count]; None where nobody knows before the features are made (a TFDS dataset).
      origin: where that stands, and how many of them were looked at where it is not all.
      cached: bytes of the feature cache, 0 where there is none yet.
      kinds: (task, references) of the samples, each once; None where nobody knows.
    """

    count: int
    tokens: np.ndarray | None
    origin: str
    cached: int = 0
    kinds: frozenset[tuple[str, int]] | None = None

    @property
    def total(self) -> float | None:
        """Image tokens of all samples, each once."""
        return None if self.tokens is None else float(np.sum(self.tokens))


def find(config: Mapping[str, Any]) -> Samples:
    """The samples of a config's sources. Nothing is made or decoded.

    Raises:
      UserError: a source that is not there or can't be read, or one without samples.
    """
    data = DataConfig.of(config)
    parts = [_cached(data, name) or _opened(data.canvas, source) for name, source in data.sources.items()]
    if not all(part.count for part in parts):
        raise UserError("a source has no samples")
    known = all(part.tokens is not None for part in parts)
    tokens = np.concatenate([part.tokens for part in parts]) if known else None
    origins = ", ".join(dict.fromkeys(part.origin for part in parts))
    cached = max(part.cached for part in parts) if all(part.cached for part in parts) else 0
    kinds = None if None in (each := [part.kinds for part in parts]) else frozenset().union(*each)
    return Samples(sum(part.count for part in parts), tokens, origins, cached, kinds)


def _cached(data: DataConfig, name: str) -> Samples | None:
    """Of the newest index that a source has in the cache with these canvases."""
    folder = epath.Path(data.cache.dir)
    wanted = {"dataset": name, "source": dataclasses.asdict(data.sources[name]),
              "canvas": dataclasses.asdict(data.canvas)}
    wanted = json.loads(json.dumps(wanted))  # as an index has it
    found = []
    for path in (folder / "index").glob("*.safetensors") if (folder / "index").exists() else ():
        with path.open("rb") as file:
            settings = store.header(file, path)[1]["settings"]
        if wanted.items() <= settings.items():
            found.append((path.stat().mtime, path))
    if not found:
        return None
    features = Features(folder, [max(found, key=lambda one: one[0])[1]])
    shards = folder / "shards"
    nbytes = sum(path.stat().length for path in shards.iterdir()) if shards.exists() else 0
    kinds = frozenset((features.tasks[task], int(count)) for task, count in {
        *zip(features.task.tolist(), features.references.tolist(), strict=True)})
    return Samples(len(features), features.tokens, "the feature cache", nbytes, kinds)


def _opened(canvas: CanvasConfig, source: SourceConfig) -> Samples:
    """Of a source whose features are not made yet."""
    opened = open_source(source.path, source.split, source.fields, source.prefix)
    if not isinstance(opened, manifest.Source):
        return Samples(len(opened), None, "the dataset")
    read = opened.manifest
    rows = read.rows[::max(1, -(-len(read.rows) // HEADERS))]
    seen = check.look({path: field == "mask" for row in rows for field, path in row.files})
    rng = np.random.default_rng(0)
    good = [row for row in rows if all(seen[path].size for _, path in row.files)]
    tokens = np.array([check.tokens_of(canvas, row, seen, rng) for row in good], np.int64)
    # lines that were not looked at are as those that were
    looked = "" if len(good) == len(read.rows) else f", by {len(good)} of its samples"
    return Samples(len(read.rows), np.resize(tokens, len(read.rows)) if len(tokens) else None, f"the manifest{looked}",
                   kinds=frozenset(opened.kinds))
