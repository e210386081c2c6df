"""From a config to what a run reads: its samples, their features, the stream of batches."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from acejax import fields
from acejax.data import buckets
from acejax.data.augment import AugmentConfig
from acejax.data.cache.build import Report, build
from acejax.data.cache.features import Features
from acejax.data.config import BatchConfig, DataConfig, SourceConfig, StageConfig
from acejax.data.encoders import Encoders
from acejax.data.sample import Sample
from acejax.data.schedule import Stage, fits
from acejax.data.stream import Stream, Table, batch_sizes
from acejax.data.subset import MOST, Subset, hold_out
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.parallel import kernels, rules


def check(data: DataConfig, mesh: Mesh, accumulate: int = 1) -> None:
    """What can be known to go wrong with a run's batches before anything is encoded.

    Raises:
      UserError: no stages or batches, or batch sizes that the mesh does not divide or that hold no sample.
    """
    if not data.stages or data.batches is None:
        raise UserError(f"config.{'data.batch_tokens' if data.stages else 'stages'} is missing")
    for _, size in data.batches.batch_sizes:
        rules.check_batch(mesh, size, accumulate)
    if not data.batches.batch_sizes:
        batch_sizes([data.batches.bucket_multiple], data.batches.batch_tokens, rules.batch_parts(mesh, accumulate))


def make_features(data: DataConfig, sources: Mapping[str, Sequence[Sample]] | None = None,
                  encoders: Encoders | None = None, model: MMDiTConfig | None = None) -> Features:
    """The features of all sources; what is not in the cache yet is encoded. As `build_features`."""
    reports = build_features(data, sources, encoders, model)
    return Features(data.cache.dir, [report.index for report in reports])


def build_features(data: DataConfig, sources: Mapping[str, Sequence[Sample]] | None = None,
                   encoders: Encoders | None = None, model: MMDiTConfig | None = None, recheck: bool = False
                   ) -> list[Report]:
    """Encode what is not in the cache yet of each source.

    Args:
      sources, encoders: instead of those that the config names.
      model: the transformer that is to read them.
      recheck: read sources that have not changed as well.

    Raises:
      UserError: what the sources, the encoders or `acejax.data.cache.build.build` find wrong; a stage or a weight that
        no sample has, as far as the sources tell it (manifests do); text of another width than the model's.
    """
    if encoders is None and not epath.Path(data.cache.dir).exists():  # else what another device has made may be whole
        data.encoders.check_device(kernels.device_of())
    if sources is None:
        sources = {name: source.open() for name, source in data.sources.items()}
    _check_stages(data.stages, sources)
    encoders = data.load_encoders() if encoders is None else encoders
    if model is not None and encoders.text_shape is not None:
        for field, width in zip(("context_in_dim", "vec_in_dim"), encoders.text_shape[1:], strict=True):
            if getattr(model, field) != width:
                raise UserError(f"config.model.{field} is {getattr(model, field)}; the text encoders give {width}")
    settings = data.settings(encoders)
    return [build(source, settings[name], data.canvas, data.augment, encoders, data.cache, data.max_broken,
                  recheck=recheck) for name, source in sources.items()]


def make_held_out(data: DataConfig, features: Features, held: int, sources: Mapping[str, Any], seed: int,
                  model: MMDiTConfig | None = None) -> tuple[Table, Subset, Callable[[int], str]]:
    """The samples to train on, those to judge by, and the prompt of one of these, from its index in its whole table.

    Args:
      held: samples of each task of each dataset.
      sources: where they come from, as `config.data.sources`; without any they are kept out of `features`.
      seed: of the choice.

    Raises:
      UserError: as `build_features`; sources or a share of a task too small to give any.
    """
    if not sources:
        training, judged = hold_out(features, held, seed)
        if not len(judged):
            raise UserError(f"config.validation: no task has samples enough to keep {held} out (at most "
                            f"{MOST:.0%} of a task's); expected more data, config.validation.sources, or every and "
                            "grid_every of 0")
        return training, judged, _prompts(data, features)
    own = {name: fields.read(SourceConfig, sources, name, "validation.sources.") for name in sources}
    data = dataclasses.replace(data, sources=own, augment=AugmentConfig(), stages=())
    table = make_features(data, model=model)
    return features, hold_out(table, held or len(table), seed, most=1.0)[1], _prompts(data, table)


def _prompts(data: DataConfig, features: Features) -> Callable[[int], str]:
    """Prompts by a sample's index; sources are opened when the first is asked for."""
    opened = functools.cache(lambda name: data.sources[name].open())

    def prompt(index: int) -> str:
        name, row = features.origin(index)
        return opened(name)[row].prompt

    return prompt


def make_stream(stages: Sequence[StageConfig], steps: int, batches: BatchConfig, table: Table, mesh: Mesh, seed: int,
                max_broken: float = 0.01, accumulate: int = 1) -> Stream:
    """The stream of a run of so many steps over a table's samples; `accumulate` parts of a batch follow each other.

    Raises:
      UserError: batch sizes that can't be, and as `Stream`.
    """
    sizes = dict(batches.batch_sizes)
    if not sizes:
        chosen = buckets.choose(table.tokens, batches.bucket_multiple, batches.most_buckets)
        sizes = batch_sizes(chosen, batches.batch_tokens, rules.batch_parts(mesh, accumulate))
    return Stream(table, [Stage(round(stage.share * steps), stage.weights, stage.references) for stage in stages],
                  sorted(sizes), sizes, seed, max_broken)


def _check_stages(stages: Sequence[StageConfig], sources: Mapping[str, Sequence[Sample]]) -> None:
    """Each stage and each of its weights must have samples; a source that does not tell what it has may have any."""
    kinds = {name: getattr(source, "kinds", None) for name, source in sources.items()}
    if any(found is None for found in kinds.values()):
        return
    for number, stage in enumerate(stages):
        names = sorted({f"{name}/{task}" for name, found in kinds.items() for task, references in found
                        if stage.references is None or references <= stage.references})
        for pattern, weight in ({"*": 1} if stage.weights is None else stage.weights).items():
            if weight and not fits(pattern, names):
                raise UserError(f"config.stages[{number}]: no samples of {pattern!r}" + (
                    "" if stage.references is None else f" with at most {stage.references} references")
                    + f"; there are {', '.join(names) or 'none'}")
