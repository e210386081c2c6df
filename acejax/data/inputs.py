"""From a config to what a run reads: its samples, their features, the stream of batches."""

from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from jax.sharding import Mesh

from acejax.data import buckets
from acejax.data.cache.build import build
from acejax.data.cache.features import Features
from acejax.data.config import DataConfig
from acejax.data.encoders import Encoders
from acejax.data.sample import Sample
from acejax.data.schedule import Stage
from acejax.data.stream import Stream, Table, batch_sizes
from acejax.errors import UserError
from acejax.parallel import rules


def make_features(data: DataConfig, sources: Mapping[str, Sequence[Sample]] | None = None,
                  encoders: Encoders | None = None) -> Features:
    """The features of all sources; what is not in the cache yet is encoded.

    Args:
      sources, encoders: instead of those that the config names.

    Raises:
      UserError: what the sources, the encoders or `acejax.data.cache.build.build` find wrong.
    """
    if sources is None:
        sources = {name: source.open() for name, source in data.sources.items()}
    encoders = data.load_encoders() if encoders is None else encoders
    settings = data.settings(encoders)
    for name, source in sources.items():
        build(source, settings[name], data.canvas, data.augment, encoders, data.cache, data.max_broken)
    return Features.open(data.cache.dir, list(settings.values()))


def make_stream(config: ml_collections.ConfigDict, table: Table, mesh: Mesh) -> Stream:
    """The stream of a run over a table's samples.

    Raises:
      UserError: stages or batch sizes that can't be, and as `Stream`.
    """
    sizes = _batch_sizes(config, table.tokens, mesh)
    return Stream(table, _stages(config), sorted(sizes), sizes, config.seed)


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
