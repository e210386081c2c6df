"""From a config and a table of samples to the stream of a run: stages, buckets, batch sizes."""

import ml_collections
import numpy as np
from jax.sharding import Mesh

from acejax.data import buckets
from acejax.data.schedule import Stage
from acejax.data.stream import Stream, Table, batch_sizes
from acejax.errors import UserError
from acejax.parallel import rules


def stages(config: ml_collections.ConfigDict) -> list[Stage]:
    """The stages, each with its share of the steps.

    Raises:
      UserError: shares that are not 1 together, or a field that no stage has.
    """
    if not np.isclose(total := sum(stage.get("share", 0) for stage in config.stages), 1):
        raise UserError(f"config.stages: the shares are {total:g} together; expected 1")
    made = []
    for number, stage in enumerate(config.stages, 1):
        if unknown := set(stage) - {"share", "weights", "references"}:
            raise UserError(f"config.stages: stage {number} has {', '.join(sorted(unknown))}; expected share, weights "
                            "and references")
        made.append(Stage(round(stage["share"] * config.steps), stage.get("weights"), stage.get("references")))
    return made


def sizes(config: ml_collections.ConfigDict, tokens: np.ndarray, mesh: Mesh) -> dict[int, int]:
    """Samples of a batch by bucket: the config's own pairs, or buckets for these token counts.

    Raises:
      UserError: a batch that the mesh does not divide.
    """
    data = config.data
    if not data.batch_sizes:
        chosen = buckets.choose(tokens, data.bucket_multiple, data.most_buckets)
        return batch_sizes(chosen, data.batch_tokens, rules.batch_parts(mesh))
    for _, size in data.batch_sizes:
        rules.check_batch(mesh, size)
    return dict(data.batch_sizes)


def make_stream(config: ml_collections.ConfigDict, table: Table, mesh: Mesh) -> Stream:
    """The stream of a run over a table's samples.

    Raises:
      UserError: as `stages`, `sizes` and `Stream`.
    """
    by_bucket = sizes(config, table.tokens, mesh)
    return Stream(table, stages(config), sorted(by_bucket), by_bucket, config.seed, config.data.get("max_broken", 0.01))
