"""What has to be encoded, cut into chunks of one shard each: the same chunks whatever is there already."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from acejax.data import survey, tiles
from acejax.data.layout import TOKEN
from acejax.data.store import NONE, Table
from acejax.data.survey import MASK, REFERENCES, Survey

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


class Work(NamedTuple):
    """Chunks of jobs for the tiles that are missing; `needed` and `missing` count tiles, `nbytes` is what they take."""

    chunks: list[list[Job]]
    needed: int
    missing: int
    nbytes: int


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

    chunks: dict[int, list[Job]] = {}
    raw = keys.view("<u8").reshape(-1, 2)  # 16 bytes of numpy lose zeros at their end
    last = -1
    number = np.cumsum(begins)
    for i in np.flatnonzero(missing):
        e = order[i]
        slot = int(place.slot[e])
        tile = (FIELDS[slot] if slot < REFERENCES else "reference", raw[e].tobytes())
        jobs = chunks.setdefault(int(chunk[i]), [])
        if number[i] == last:
            jobs[-1] = jobs[-1]._replace(tiles=(*jobs[-1].tiles, tile))
        else:
            jobs.append(Job(int(place.sample[e]), int(place.visit[e]), int(unit[e]), int(place.height[e]),
                            int(place.width[e]), (tile,)))
        last = number[i]
    return Work(list(chunks.values()), len(keys), int(missing.sum()), int(nbytes[order][missing].sum()))


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
