"""Missing features into shards: threads decode pictures ahead, an encoder takes them in batches of few shapes."""

import collections
import concurrent.futures
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from acejax import lcu
from acejax.data.cache import tiles
from acejax.data.cache.chunks import GREY, Job
from acejax.data.cache.store import Store
from acejax.data.cache.survey import Recipe, ahead
from acejax.data.encoders import EncodePrompts
from acejax.data.latents import EncodePictures
from acejax.data.progress import Progress
from acejax.data.sample import Sample
from acejax.errors import UserError

IN_FLIGHT = 2  # batches that the device may still be at
Rows = dict[str, list[tuple[bytes, np.ndarray]]]  # kind of the store -> keys and rows


class Shards:
    """Writes one shard while the next is made."""

    def __init__(self, store: Store):
        self._store, self._pool = store, concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None
        self.nbytes = 0

    def add(self, rows: Rows) -> None:
        self._wait()
        if any(rows.values()):
            self._writing = self._pool.submit(self._store.add, {kind: pairs for kind, pairs in rows.items() if pairs})

    def _wait(self) -> None:
        if self._writing is not None:
            self.nbytes += self._writing.result()
            self._writing = None

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self._wait()
        finally:
            self._pool.shutdown()


class Batches:
    """Rows of equal shapes through an encoder, `size` at a time; the last row fills a batch up, so that each shape is
    compiled once. `finish` gets (keys, what the encoder gave for them) in order.
    """

    def __init__(self, encode: Callable[[Any], Any], size: int, finish: Callable[[list[bytes], Any], None]):
        self._encode, self._size, self._finish = encode, size, finish
        self._keys: list[bytes] = []
        self._rows: list[Any] = []
        self._sent: collections.deque[tuple[list[bytes], Any]] = collections.deque()

    def add(self, key: bytes, row: Any) -> None:
        if self._rows and np.shape(row) != np.shape(self._rows[0]):
            self._send()
        self._keys.append(key)
        self._rows.append(row)
        if len(self._rows) == self._size:
            self._send()

    def flush(self) -> None:
        """Everything that was added is finished."""
        self._send()
        while self._sent:
            self._finish(*self._sent.popleft())

    def _send(self) -> None:
        if not self._rows:
            return
        filled = self._rows + self._rows[-1:] * (self._size - len(self._rows))
        self._sent.append((self._keys, self._encode(filled)))
        self._keys, self._rows = [], []
        while len(self._sent) > IN_FLIGHT:
            self._finish(*self._sent.popleft())


def encode_tiles(jobs: Iterable[tuple[int, Job]], source: Sequence[Sample], rows: np.ndarray, recipe: Recipe,
                 encode: EncodePictures, batch: int, dtype: np.dtype, store: Store, threads: int, progress: Progress,
                 broken: Callable[[Job, UserError], None]) -> int:
    """Make and write the tiles of jobs; returns the bytes written.

    Args:
      jobs: with the number of the shard that they go to; those of a shard follow each other.
      source: the samples; `rows` [M] tells which of them a job's sample is.
      recipe: of the tiles.
      encode: pictures to latents.
      batch: tiles encoded at once.
      dtype: what is stored.
      store: where shards go.
      threads: that decode.
      progress: gets an update for every tile.
      broken: is told of a job whose pictures can't be decoded.
    """
    kept: Rows = {}

    def keep(keys: list[bytes], latents: Any) -> None:
        tokens = np.asarray(latents)[:len(keys)]
        height, width = tokens.shape[1] // lcu.PATCH, tokens.shape[2] // lcu.PATCH
        tokens = lcu.patchify(tokens).reshape(len(tokens), height, width, -1).astype(dtype)
        kept.setdefault(f"latents.{height}x{width}", []).extend(zip(keys, tokens, strict=True))
        progress.update(len(keys))

    batches = Batches(lambda pictures: encode(np.stack(pictures)), batch, keep)

    def make(item: tuple[int, Job]) -> tuple[int, Job, dict[str, np.ndarray] | UserError]:
        try:
            return *item, _pixels(item[1], source, rows, recipe)
        except UserError as error:
            return *item, error

    with Shards(store) as shards, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        made = ahead(pool, make, jobs, threads + max(1, batch // 2))
        for _, of_shard in itertools.groupby(made, key=operator.itemgetter(0)):
            for _, job, found in of_shard:
                if isinstance(found, UserError):
                    broken(job, found)
                    progress.update(len(job.tiles))
                    continue
                for name, key in job.tiles:
                    if name == "mask":
                        kept.setdefault("mask." + "x".join(map(str, found[name].shape)), []).append((key, found[name]))
                        progress.update()
                    else:
                        batches.add(key, found[name])
            batches.flush()
            shards.add(kept)
            kept = {}
    return shards.nbytes


def encode_prompts(chunks: Sequence[Sequence[int]], prompts: Callable[[int], tuple[bytes, str]],
                   encode: EncodePrompts, batch: int, dtype: np.dtype, store: Store, progress: Progress
                   ) -> int:
    """Encode and write prompts (`prompts(number)` gives key and text); returns the bytes written.

    A prompt's row is its text features, then the pooled ones.
    """
    kept: Rows = {}

    def keep(keys: list[bytes], features: tuple[Any, Any]) -> None:
        text, pooled = (np.asarray(part)[:len(keys)].astype(dtype) for part in features)
        shape = (*text.shape[1:], pooled.shape[1])
        rows = np.concatenate([text.reshape(len(keys), -1), pooled], 1)
        kept.setdefault("text." + "x".join(map(str, shape)), []).extend(zip(keys, rows, strict=True))
        progress.update(len(keys))

    batches = Batches(encode, batch, keep)
    with Shards(store) as shards:
        for chunk in chunks:
            for number in chunk:
                batches.add(*prompts(number))
            batches.flush()
            shards.add(kept)
            kept = {}
    return shards.nbytes


def _pixels(job: Job, source: Sequence[Sample], rows: np.ndarray, recipe: Recipe) -> dict[str, np.ndarray]:
    if job.unit == GREY:
        return {"reference": np.zeros((job.height, job.width, 3), np.float32)}
    sample = source[int(rows[job.sample])]
    plan = recipe.visit(sample, tiles.hashes(sample), job.visit)
    return tiles.pixels(sample, recipe.canvas, plan, job.unit)
