"""The data part of a run's config (`configs/ace_plus.py`), checked field by field."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from acejax import fields
from acejax.data import buckets
from acejax.data.augment import AugmentConfig
from acejax.data.cache.build import CacheConfig, settings
from acejax.data.cache.index import Settings
from acejax.data.encoders import Encoders, EncodersConfig
from acejax.data.layout import CanvasConfig
from acejax.data.sample import Sample
from acejax.data.sources import open_source
from acejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Arguments of `acejax.data.sources.open_source`."""

    path: str
    split: str = "train"
    fields: Any = None
    prefix: str | None = None

    def open(self) -> Sequence[Sample]:
        return open_source(self.path, self.split, self.fields, self.prefix)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How samples become batches.

    Attributes:
      bucket_multiple: token counts are padded to multiples of this,
      most_buckets: of which there are at most so many; each is a shape to compile.
      batch_tokens: of a batch, of all devices together.
      batch_sizes: pairs (tokens, samples) instead of the three above.
    """

    bucket_multiple: int = buckets.MULTIPLE
    most_buckets: int = buckets.MOST
    batch_tokens: int = 0
    batch_sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        if min(self.bucket_multiple, self.most_buckets) < 1:
            raise UserError(f"data.bucket_multiple is {self.bucket_multiple} and most_buckets {self.most_buckets}; "
                            "expected at least 1")
        if not self.batch_sizes and self.batch_tokens < 1:
            raise UserError(f"data.batch_tokens is {self.batch_tokens or 'missing'}; expected 1 or more, or "
                            "batch_sizes")
        if any(min(pair) < 1 for pair in self.batch_sizes):
            raise UserError(f"data.batch_sizes is {self.batch_sizes}; expected pairs (tokens, samples) of at least 1")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A part of the run: its share of the steps; the rest as `acejax.data.schedule.Stage`."""

    share: float
    weights: Mapping[str, float] | None = None
    references: int | None = None

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"share is {self.share!r}; expected above 0, up to 1")
        if any(weight < 0 for weight in (self.weights or {}).values()):
            raise UserError(f"weights is {dict(self.weights)}; expected numbers of 0 or more")
        if self.references is not None and self.references < 0:
            raise UserError(f"references is {self.references}; expected 0 or more, or None")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads, and what becomes of it.

    Attributes:
      sources: by name.
      canvas, augment, encoders, cache: as the classes say; encoders are None where others are given.
      seed: of the run.
      batches, stages: as the classes say; None and () where only features are made.
      max_broken: share of broken samples that stops it.
    """

    sources: Mapping[str, SourceConfig]
    canvas: CanvasConfig
    augment: AugmentConfig
    encoders: EncodersConfig | None
    cache: CacheConfig
    seed: int
    batches: BatchConfig | None = None
    stages: tuple[StageConfig, ...] = ()
    max_broken: float = 0.01

    @classmethod
    def of(cls, config: Mapping[str, Any], cache_dir: str | None = None) -> "DataConfig":
        """Read `data`, `stages`, `encoders`, `cache` and `seed` of a run's config; `cache_dir` stands in for
        `cache.dir`. Batches and stages may be left out where features are all that is wanted.

        Raises:
          UserError: a field that is missing, unknown, of another type, or out of range.
        """
        data = fields.part(config, "data")
        given = fields.part(data, "sources", "data.")
        if not given:
            raise UserError("config.data.sources is empty; expected {name: {'path': ..., 'split': 'train'}}")
        sources = {name: fields.read(SourceConfig, given, name, "data.sources.") for name in given}
        stored = dict(fields.part(config, "cache")) | ({} if cache_dir is None else {"dir": cache_dir})
        max_broken = fields.value(data.get("max_broken", 0.01), float, "config.data.max_broken")
        if not 0 <= max_broken <= 1:
            raise UserError(f"config.data.max_broken is {max_broken!r}; expected a share, 0 to 1")
        seed = fields.value(config.get("seed", 0), int, "config.seed")
        if seed < 0:
            raise UserError(f"config.seed is {seed}; expected 0 or more")
        own = ("sources", "canvas", "augment", "max_broken")
        return cls(sources, fields.read(CanvasConfig, data, "canvas", "data."),
                   fields.read(AugmentConfig, data, "augment", "data."),
                   fields.read(EncodersConfig, config, "encoders"),
                   fields.read(CacheConfig, {"cache": stored}, "cache"), seed,
                   read_batches(data, own) if set(data) - set(own) else None,
                   read_stages(config, sources) if "stages" in config else (), max_broken)

    def load_encoders(self) -> Encoders:
        """The encoders, of which nothing is read yet but names; weights are hashed once for each cache."""
        return Encoders.load(self.encoders, notes=epath.Path(self.cache.dir) / "weights.json")

    def settings(self, encoders: Encoders) -> dict[str, Settings]:
        """Of each source, by name: what its features are found by."""
        return {name: settings(name, dataclasses.asdict(source), self.canvas, self.augment, encoders, self.cache,
                                     self.seed) for name, source in self.sources.items()}


def read_batches(data: Mapping[str, Any], others: Sequence[str]) -> BatchConfig:
    """The batches of `config.data`, of which `others` are no fields of theirs.

    Raises:
      UserError: as `DataConfig.of`.
    """
    own = [field.name for field in dataclasses.fields(BatchConfig)]
    if unknown := sorted(set(data) - {*own, *others}):
        raise UserError(f"config.data.{unknown[0]}: no such field; expected {', '.join((*others, *own))}")
    return fields.read(BatchConfig, {"data": {name: data[name] for name in own if name in data}}, "data")


def read_stages(config: Mapping[str, Any], datasets: Sequence[str]) -> tuple[StageConfig, ...]:
    """The stages of a run's config over sources of these names.

    Raises:
      UserError: as `DataConfig.of`, shares that are not 1 together, or a weight of another dataset.
    """
    if not isinstance(config["stages"], tuple | list) or not config["stages"]:
        raise UserError(f"config.stages is {config['stages']!r}; expected one or more")
    stages = tuple(fields.read(StageConfig, {name: stage}, name) for name, stage in
                   ((f"stages[{number}]", stage) for number, stage in enumerate(config["stages"])))
    if not np.isclose(total := sum(stage.share for stage in stages), 1):
        raise UserError(f"config.stages: the shares are {total:g} together; expected 1")
    for number, stage in enumerate(stages):
        for pattern in stage.weights or ():
            if "/" in pattern and not fnmatch.filter(datasets, pattern.split("/")[0]):
                raise UserError(f"config.stages[{number}].weights: {pattern!r} is of no source; there are "
                                f"{', '.join(datasets)}")
    return stages
