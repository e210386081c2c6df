"""Some samples of a table, and the split of a table into what is trained on and what is held out."""

from collections.abc import Sequence

import numpy as np
import xxhash

from acejax.data.stream import Row, Table

MOST = 0.1  # of a task that is held out at most: a small task is for training


class Subset:
    """The samples `indices` of a table, as a table.

    Attributes:
      table, indices: what it was made of; indices are those of the table.
      digest: names the samples and their order, where the table has one; else "".
    """

    def __init__(self, table: Table, indices: Sequence[int]):
        self.table, self.indices = table, np.asarray(indices, np.int64)
        self.tokens, self.references, self.task, self.dataset = (
            np.asarray(values)[self.indices] for values in (table.tokens, table.references, table.task, table.dataset))
        self.tasks, self.datasets = tuple(table.tasks), tuple(table.datasets)
        whole = getattr(table, "digest", "")
        self.digest = whole and xxhash.xxh3_128_hexdigest(whole.encode() + self.indices.tobytes())

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, index: int, rng: np.random.Generator) -> Row:
        return self.table.fetch(int(self.indices[index]), rng)

    def origin(self, index: int) -> tuple[str, int]:
        """As the table's."""
        return self.table.origin(int(self.indices[index]))


def hold_out(table: Table, held: int, seed: int, most: float = MOST) -> tuple[Subset, Subset]:
    """Split a table: what is left for training, and `held` samples of each task of each dataset.

    A task gives at most the share `most` of its samples, so one of few samples may give none. What is drawn of a task
    depends on the seed, the names of dataset and task and the number of its samples alone: the same on all hosts, and
    whatever other datasets there are; with a greater `held` it holds what it held with a smaller one.

    Returns:
      Subsets in the table's order.
    """
    chosen = np.zeros(len(table.task), bool)
    for d, dataset in enumerate(table.datasets):
        for t, task in enumerate(table.tasks):
            own = np.flatnonzero((table.dataset == d) & (table.task == t))
            draw = np.random.default_rng((seed, xxhash.xxh3_64_intdigest(f"{dataset}/{task}".encode())))
            chosen[draw.permutation(own)[:min(held, int(most * len(own)))]] = True
    return Subset(table, np.flatnonzero(~chosen)), Subset(table, np.flatnonzero(chosen))
