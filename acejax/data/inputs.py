"""From a config to what a run reads: its samples, their features, the stream of batches."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from acejax.data import buckets
from acejax.data.cache.build import build
from acejax.data.cache.features import Features
from acejax.data.config import BatchConfig, DataConfig, StageConfig
from acejax.data.encoders import Encoders
from acejax.data.sample import Sample
from acejax.data.schedule import Stage, fits
from acejax.data.stream import Stream, Table, batch_sizes
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.parallel import rules


def check(data: DataConfig, mesh: Mesh) -> None:
    """What can be known to go wrong with a run's batches before anything is encoded.

    Raises:
      UserError: no stages or batches, or batch sizes that the mesh does not divide or that hold no sample.
    """
    if not data.stages or data.batches is None:
        raise UserError(f"config.{'data.batch_tokens' if data.stages else 'stages'} is missing")
    for _, size in data.batches.batch_sizes:
        rules.check_batch(mesh, size)
    if not data.batches.batch_sizes:
        batch_sizes([data.batches.bucket_multiple], data.batches.batch_tokens, rules.batch_parts(mesh))


def make_features(data: DataConfig, sources: Mapping[str, Sequence[Sample]] | None = None,
                  encoders: Encoders | None = None, model: MMDiTConfig | None = None) -> Features:
    """The features of all sources; what is not in the cache yet is encoded.

    Args:
      sources, encoders: instead of those that the config names.
      model: the transformer that is to read them.

    Raises:
      UserError: what the sources, the encoders or `acejax.data.cache.build.build` find wrong; a weight of a task that
        the sources do not have, as far as they tell their tasks; text of another width than the model's.
    """
    if sources is None:
        sources = {name: source.open() for name, source in data.sources.items()}
    _check_tasks(data.stages, sources)
    encoders = data.load_encoders() if encoders is None else encoders
    if model is not None and encoders.text_shape is not None:
        for field, width in zip(("context_in_dim", "vec_in_dim"), encoders.text_shape[1:], strict=True):
            if getattr(model, field) != width:
                raise UserError(f"config.model.{field} is {getattr(model, field)}; the text encoders give {width}")
    settings = data.settings(encoders)
    for name, source in sources.items():
        build(source, settings[name], data.canvas, data.augment, encoders, data.cache, data.max_broken)
    return Features.open(data.cache.dir, list(settings.values()))


def make_stream(stages: Sequence[StageConfig], steps: int, batches: BatchConfig, table: Table, mesh: Mesh, seed: int,
                max_broken: float = 0.01) -> Stream:
    """The stream of a run of so many steps over a table's samples.

    Raises:
      UserError: batch sizes that can't be, and as `Stream`.
    """
    sizes = dict(batches.batch_sizes)
    if not sizes:
        chosen = buckets.choose(table.tokens, batches.bucket_multiple, batches.most_buckets)
        sizes = batch_sizes(chosen, batches.batch_tokens, rules.batch_parts(mesh))
    return Stream(table, [Stage(round(stage.share * steps), stage.weights, stage.references) for stage in stages],
                  sorted(sizes), sizes, seed, max_broken)


def _check_tasks(stages: Sequence[StageConfig], sources: Mapping[str, Sequence[Sample]]) -> None:
    """A weight's name must fit some `dataset/task`; a source that does not tell its tasks may have any."""
    tasks = {name: getattr(source, "tasks", None) for name, source in sources.items()}
    if any(found is None for found in tasks.values()):
        return
    names = sorted(f"{name}/{task}" for name, found in tasks.items() for task in found)
    for number, stage in enumerate(stages):
        for pattern, weight in (stage.weights or {}).items():
            if weight and not fits(pattern, names):
                raise UserError(f"config.stages[{number}].weights: no samples of {pattern!r}; there are "
                                f"{', '.join(names)}")
