"""From a config to what a run reads: its samples, their features, the stream of batches."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ml_collections
import numpy as np
from jax.sharding import Mesh

from acejax.data import buckets, cache
from acejax.data.augment import AugmentConfig
from acejax.data.cache import CacheConfig
from acejax.data.encoders import Encoders, EncodersConfig
from acejax.data.features import Features
from acejax.data.layout import CanvasConfig
from acejax.data.sample import Sample
from acejax.data.schedule import Stage
from acejax.data.sources import open_source
from acejax.data.stream import Stream, Table, batch_sizes
from acejax.errors import UserError
from acejax.parallel import rules

T = TypeVar("T")


def open_sources(config: ml_collections.ConfigDict) -> dict[str, Sequence[Sample]]:
    """The samples of each of `config.data.sources`.

    Raises:
      UserError: none, one without a path, or what `open_source` finds wrong.
    """
    if not config.data.get("sources"):
        raise UserError("config.data.sources is missing or empty; expected {name: {'path': ..., 'split': 'train'}}")
    opened = {}
    for name, about in config.data.sources.items():
        known = ("path", "split", "fields", "prefix")
        if unknown := set(about) - set(known) or "path" not in about:
            found = "no path" if unknown is True else ", ".join(sorted(unknown))
            raise UserError(f"config.data.sources.{name} has {found}; expected path, and split, fields or prefix")
        opened[name] = open_source(**about)
    return opened


def make_features(config: ml_collections.ConfigDict, sources: Mapping[str, Sequence[Sample]],
                  encoders: Encoders | None = None) -> tuple[Features, list[cache.Report]]:
    """The features of all sources; what is not in `config.cache.dir` yet is encoded.

    Args:
      encoders: instead of those of `config.encoders`.

    Raises:
      UserError: settings that can't be, or what `acejax.data.cache.build` finds wrong.
    """
    canvas = _settings(CanvasConfig, "data.canvas", config.data.canvas)
    augment = _settings(AugmentConfig, "data.augment", config.data.get("augment", {}))
    kept = _settings(CacheConfig, "cache", config.cache)
    if encoders is None:
        encoders = Encoders.load(_settings(EncodersConfig, "encoders", config.encoders))
    described, reports = [], []
    for name, source in sources.items():
        about = dict(config.data.sources.get(name, {}))
        described.append(cache.settings(name, about, canvas, augment, encoders, kept, config.seed))
        reports.append(cache.build(source, described[-1], canvas, augment, encoders, kept,
                                   config.data.get("max_broken", 0.01)))
    return Features.open(kept.dir, described), reports


def make_stream(config: ml_collections.ConfigDict, table: Table, mesh: Mesh) -> Stream:
    """The stream of a run over a table's samples.

    Raises:
      UserError: stages or batch sizes that can't be, and as `Stream`.
    """
    sizes = _batch_sizes(config, table.tokens, mesh)
    return Stream(table, _stages(config), sorted(sizes), sizes, config.seed, config.data.get("max_broken", 0.01))


def _stages(config: ml_collections.ConfigDict) -> list[Stage]:
    if not np.isclose(total := sum(stage.get("share", 0) for stage in config.stages), 1):
        raise UserError(f"config.stages: the shares are {total:g} together; expected 1")
    made = []
    for number, stage in enumerate(config.stages, 1):
        if unknown := set(stage) - {"share", "weights", "references"}:
            raise UserError(f"config.stages: stage {number} has {', '.join(sorted(unknown))}; expected share, weights "
                            "and references")
        made.append(Stage(round(stage["share"] * config.steps), stage.get("weights"), stage.get("references")))
    return made


def _batch_sizes(config: ml_collections.ConfigDict, tokens: np.ndarray, mesh: Mesh) -> dict[int, int]:
    """Samples of a batch by bucket: the config's own pairs, or buckets for these token counts."""
    data = config.data
    if not data.batch_sizes:
        chosen = buckets.choose(tokens, data.bucket_multiple, data.most_buckets)
        return batch_sizes(chosen, data.batch_tokens, rules.batch_parts(mesh))
    for _, size in data.batch_sizes:
        rules.check_batch(mesh, size)
    return dict(data.batch_sizes)


def _settings(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    """A config's fields as the dataclass that checks them."""
    values = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else dict(values)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = {field.name for field in fields.values()
              if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
    if wrong := [*(set(values) - set(fields)), *(needed - set(values))]:
        what = "unknown" if wrong[0] in values else "missing"
        raise UserError(f"config.{name}.{wrong[0]} is {what}; expected {', '.join(fields)}")
    return kind(**values)
