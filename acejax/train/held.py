"""Held-out samples as batches over the mesh, each with noise that is its own for ever."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from acejax.data import buckets
from acejax.data.stream import PAD_UNIT, Row, collate
from acejax.data.subset import Subset
from acejax.parallel import rules


@dataclasses.dataclass(frozen=True)
class HeldBatch:
    """Some samples of one bucket.

    Attributes:
      bucket: tokens of a row, padding included.
      samples: places in the table, one for each row that is no padding.
      size: rows, over all processes.
    """

    bucket: int
    samples: tuple[int, ...]
    size: int


class Held:
    """A table of held-out samples (`acejax.data.subset`) in batches of static shapes.

    A sample's draws and its noise come from the seed and its index in the whole table, by numpy: they are the same at
    every step, in every batch and bucket, on every mesh and backend.

    Args:
      table: the samples.
      mesh: that batches are spread over.
      batch_sizes: the greatest batch of each bucket (as in training: what fits the memory there, fits here).
      seed: of noise and draws.
    """

    def __init__(self, table: Subset, mesh: Mesh, batch_sizes: Mapping[int, int], seed: int):
        self.table, self._mesh, self._sizes, self._seed = table, mesh, dict(batch_sizes), seed
        if (most := int(table.tokens.max())) > max(self._sizes):  # training has none so long
            self._sizes[most] = rules.batch_parts(mesh)
        self.bucket = buckets.assign(table.tokens, sorted(self._sizes))

    def batches(self, samples: Sequence[int]) -> list[HeldBatch]:
        """The given samples (places in the table) in batches, each bucket's of one size: a multiple of the mesh's
        parts, no larger than needed."""
        parts, batches = rules.batch_parts(self._mesh), []
        samples = np.asarray(samples)
        for bucket in np.unique(self.bucket[samples]):
            own = samples[self.bucket[samples] == bucket]
            size = min(self._sizes[int(bucket)], -(-len(own) // parts) * parts)
            batches += [HeldBatch(int(bucket), tuple(map(int, own[start:start + size])), size)
                        for start in range(0, len(own), size)]
        return batches

    def row(self, sample: int) -> Row:
        """A sample as the table has it, with its `noise` [S, 64]."""
        index = int(self.table.indices[sample])
        row = self.table.fetch(sample, np.random.default_rng((self._seed, index, 0)))
        noise = np.random.default_rng((self._seed, index, 1)).standard_normal(row["target"].shape, np.float32)
        return row | {"noise": noise}

    def feed(self, batch: HeldBatch, extra: Mapping[str, np.ndarray] | None = None) -> dict[str, jax.Array]:
        """A batch as global arrays; a process reads the rows that its devices hold, no other. Rows of padding are the
        last sample again, of which no token counts.

        Args:
          extra: more arrays, [rows, ...] for each sample of the batch.
        """
        sharding = rules.batch_sharding(self._mesh)
        places = sharding.addressable_devices_indices_map((batch.size,)).values()
        rows = sorted({row for (part,) in places for row in range(*part.indices(batch.size))})
        fetched = {}
        for row in rows:
            at = min(row, len(batch.samples) - 1)
            fetched[row] = self.row(batch.samples[at]) | {name: values[at] for name, values in (extra or {}).items()}
            if row > at:
                fetched[row]["unit"] = np.full_like(fetched[row]["unit"], PAD_UNIT)
        arrays = collate(list(fetched.values()), batch.bucket)

        def put(values: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> Any:
                wanted = range(*index[0].indices(batch.size))
                return values[rows.index(wanted[0]):][:len(wanted)]
            return jax.make_array_from_callback((batch.size, *values.shape[1:]), sharding, part)

        return jax.tree.map(put, arrays)
