"""What has to be encoded, cut into chunks of one shard each: the same chunks whatever is there already."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from acejax.data.cache import survey, tiles
from acejax.data.cache.store import NONE, Table
from acejax.data.cache.survey import MASK, REFERENCES, Entries, Survey
from acejax.data.layout import TOKEN

SHARD = 2**28  # bytes
PROMPTS = 64  # of a shard, where the size of their features is not known before
GREY = -2  # the unit of a grey tile; others are `tiles.TARGET` and the references
LATENTS = 64  # numbers of a token
FIELDS = ("edit", "modify", "target", "mask")


class Job(NamedTuple):
    """Tiles that are made from one unit of a sample's visit; `tiles` are (name in `tiles.pixels`, key)."""

    sample: int
    visit: int
    unit: int
    height: int
    width: int
    tiles: tuple[tuple[str, bytes], ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """The tiles that are missing.

    Attributes:
      place: of the tiles, sorted by chunk and job; with `unit`, `job` (a number that tiles of one job share), `chunk`
        and `keys` (pairs of uint64).
      needed: tiles that are needed, those that are there included.
      nbytes: that the missing ones take.
    """

    place: Entries
    unit: np.ndarray
    job: np.ndarray
    chunk: np.ndarray
    keys: np.ndarray
    needed: int
    nbytes: int

    @property
    def missing(self) -> int:
        return len(self.keys)

    def share(self, index: int, count: int) -> tuple[Iterator[tuple[int, Job]], int]:
        """Jobs of every `count`-th chunk with its number, and how many tiles they have."""
        begins = np.flatnonzero(np.diff(self.chunk, prepend=-1))
        ends = np.append(begins[1:], len(self.chunk))
        mine = list(zip(begins, ends, strict=True))[index::count]
        jobs = ((int(self.chunk[begin]), job) for begin, end in mine for job in self._jobs(begin, end))
        return jobs, int(sum(end - begin for begin, end in mine))

    def _jobs(self, begin: int, end: int) -> Iterator[Job]:
        for _, group in itertools.groupby(range(begin, end), key=self.job.__getitem__):
            tiles = list(group)
            sample, visit, _, height, width = (int(values[tiles[0]]) for values in self.place)
            slots = [int(self.place.slot[i]) for i in tiles]
            yield Job(sample, visit, int(self.unit[tiles[0]]), height, width, tuple(
                (FIELDS[slot] if slot < REFERENCES else "reference", self.keys[i].tobytes())
                for i, slot in zip(tiles, slots, strict=True)))


def of_tiles(looked: Survey, good: np.ndarray, table: Table, itemsize: int) -> Work:
    """The tiles of the samples that are `good` [M].

    Tiles of one shape follow each other, so that batches are full. A tile that several samples share is made from the
    first of them.
    """
    keys = survey.as_keys(looked.keys)
    wanted = (keys != NONE) & np.repeat(good, np.diff(looked.starts()))
    at = np.flatnonzero(wanted)
    keys, first = np.unique(keys[at], return_index=True)
    place = survey.entries(looked, at[first])
    beside = place.slot - REFERENCES
    unit = np.where(beside < 0, tiles.TARGET, np.where(beside % 2, GREY, beside // 2))
    tokens = place.height // TOKEN * (place.width // TOKEN)
    is_mask = place.slot == MASK
    nbytes = tokens * np.where(is_mask, 256 if looked.joined else 32, LATENTS * itemsize)

    order = np.lexsort((place.slot, unit, place.visit, place.sample, place.width, place.height))
    same = np.ones(max(0, len(order) - 1), bool)  # whether a tile is of the job of the one before
    for part in (place.height, place.width, place.sample, place.visit, unit):
        same &= np.diff(part[order]) == 0
    begins = np.concatenate([np.ones(min(1, len(order)), bool), ~same])
    before = np.cumsum(nbytes[order]) - nbytes[order]
    chunk = before[begins][np.cumsum(begins) - 1] // SHARD
    missing = table.find(keys[order]) < 0

    left = order[missing]
    raw = keys.view("<u8").reshape(-1, 2)  # 16 bytes of numpy lose zeros at their end
    return Work(Entries(*(values[left] for values in place)), unit[left], np.cumsum(begins)[missing], chunk[missing],
                raw[left], len(keys), int(nbytes[left].sum()))


def of_prompts(keys: Sequence[bytes], table: Table, nbytes: int | None) -> tuple[list[list[int]], int]:
    """Chunks of the numbers of distinct prompts that are missing, and how many there are.

    Args:
      keys: of all prompts that are needed, in the order in which they are encoded.
      table: the store's.
      nbytes: of one's features; None where that is not known.
    """
    a_chunk = PROMPTS if nbytes is None else max(1, SHARD // nbytes)
    there = table.find(np.frombuffer(b"".join(keys), survey.KEY)) >= 0
    chunks = [[i for i in range(start, min(start + a_chunk, len(keys))) if not there[i]]
              for start in range(0, len(keys), a_chunk)]
    return [chunk for chunk in chunks if chunk], int((~there).sum())
