"""What features a dataset needs: for every sample its layout and the names of its tiles and its prompt.

Pictures are read and hashed and their headers parsed; nothing is decoded. Kept in arrays: a million samples are 0.2 GB.
"""

import array
import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from acejax.data import prepare
from acejax.data.augment import AugmentConfig
from acejax.data.cache import tiles
from acejax.data.cache.store import KEY
from acejax.data.layout import CanvasConfig
from acejax.data.prepare import Plan
from acejax.data.progress import Progress
from acejax.data.sample import Sample
from acejax.errors import UserError

EDIT, MODIFY, TARGET, MASK, REFERENCES = range(5)  # a visit's tiles; then reference and grey in turn
A, B = TypeVar("A"), TypeVar("B")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides which features a sample needs.

    Attributes:
      canvas, augment: how pictures become a canvas.
      variants: visits drawn for each sample.
      seed: of the draws.
      encoder: names the autoencoder and the stored dtype.
      prompt_key: names a prompt's features, without the stored dtype.
      dtype: what is stored.
    """

    canvas: CanvasConfig
    augment: AugmentConfig
    variants: int
    seed: int
    encoder: str
    prompt_key: Callable[[str], bytes]
    dtype: str

    def visit(self, sample: Sample, seen: tiles.Hashes, variant: int) -> Plan:
        """Drawn from the seed and the sample's pictures: its place in the dataset and its prompt change nothing."""
        key = int.from_bytes(xxhash.xxh3_128_digest(b"".join(seen.all)))
        return prepare.plan(sample, self.canvas, self.augment, np.random.default_rng((self.seed, key, variant)))

    def prompt(self, prompt: str) -> bytes:
        return xxhash.xxh3_128_digest(self.dtype.encode() + self.prompt_key(prompt))


@dataclasses.dataclass(frozen=True)
class Survey:
    """M samples with V visits each; R_i references of sample i. Keys are pairs of uint64.

    Attributes:
      row: [M] int64, which sample of the source.
      task: [M] int32, an index into `tasks`.
      references: [M] int32, R_i.
      height, width: [M, V] int32, of the canvas and of its target in pixels.
      widths: [sum of V R_i] int32, of the references.
      keys: [sum of V (4 + 2 R_i), 2] of the tiles; canvases that are encoded whole have 4.
      prompt: [M, 2] of the prompt.
      own: [M] uint64, the same for samples of the same pictures, references apart (with parity: them too).
      pictures: [P, 2] hashes of the distinct pictures.
      text, text_end, text_key: the distinct prompts: UTF-8 [bytes], where each ends in it [D], and its key [D, 2].
      tasks: their names.
      skipped: (row, reason) of samples that can't be used.
    """

    row: np.ndarray
    task: np.ndarray
    references: np.ndarray
    height: np.ndarray
    width: np.ndarray
    widths: np.ndarray
    keys: np.ndarray
    prompt: np.ndarray
    own: np.ndarray
    pictures: np.ndarray
    text: np.ndarray
    text_end: np.ndarray
    text_key: np.ndarray
    tasks: Sequence[str]
    skipped: Sequence[tuple[int, str]]

    ARRAYS = ("row", "task", "references", "height", "width", "widths", "keys", "prompt", "own", "pictures", "text",
              "text_end", "text_key")

    def told(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """As `join` takes it."""
        return {name: getattr(self, name) for name in self.ARRAYS}, {"tasks": self.tasks, "skipped": self.skipped}

    @property
    def joined(self) -> bool:
        """Whether canvases are encoded whole."""
        return len(self.keys) == 4 * self.height.size and bool(self.references.any())

    @property
    def per_visit(self) -> np.ndarray:
        """[M] keys of a visit."""
        return np.full(len(self.row), 4) if self.joined else REFERENCES + 2 * self.references

    def prompt_text(self, number: int) -> str:
        """A distinct prompt."""
        first = self.text_end[number - 1] if number else 0
        return self.text[first:self.text_end[number]].tobytes().decode()

    def starts(self) -> np.ndarray:
        """[M + 1] where each sample's keys begin."""
        return np.concatenate([[0], np.cumsum(self.per_visit.astype(np.int64) * self.height.shape[1])])


class Entries(NamedTuple):
    """Tiles [E] and where they come from: sample, visit, slot (EDIT ...), height and width in pixels."""

    sample: np.ndarray
    visit: np.ndarray
    slot: np.ndarray
    height: np.ndarray
    width: np.ndarray


def entries(survey: Survey, at: np.ndarray) -> Entries:
    """About the tiles at these places of `survey.keys`."""
    starts = survey.starts()
    sample = np.searchsorted(starts, at, "right") - 1
    visit, slot = np.divmod(at - starts[sample], survey.per_visit[sample])
    references = survey.references[sample]
    first = np.concatenate([[0], np.cumsum(survey.references.astype(np.int64) * survey.height.shape[1])])
    before = first[sample] + visit * references
    width = survey.width[sample, visit].astype(np.int64)
    if survey.joined:
        total = np.concatenate([[0], np.cumsum(survey.widths, dtype=np.int64)])
        width = width + total[before + references] - total[before]
    elif len(survey.widths):
        own = np.minimum(before + np.maximum(slot - REFERENCES, 0) // 2, len(survey.widths) - 1)
        width = np.where(slot < REFERENCES, width, survey.widths[own])
    return Entries(sample, visit, slot, survey.height[sample, visit].astype(np.int64), width)


def look(source: Sequence[Sample], rows: Sequence[int], recipe: Recipe, threads: int, label: str) -> Survey:
    """Survey some rows of a source."""
    prompt = functools.lru_cache(2**16)(recipe.prompt)
    codes = dict.fromkeys(("task", "references", "height", "width", "widths"), "i") | {"row": "q", "own": "Q"}
    numbers = {name: array.array(code) for name, code in codes.items()}
    keys, prompts, pictures = bytearray(), bytearray(), set()
    texts, text_ends, text_keys = bytearray(), array.array("q"), {}
    tasks: dict[str, int] = {}
    skipped = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool, \
            Progress(len(rows), f"{label}: reading headers", "samples") as progress:
        for row, found in zip(rows, ahead(pool, functools.partial(_visit, source, recipe), rows, 4 * threads),
                              strict=True):
            progress.update()
            if isinstance(found, UserError):
                skipped.append((int(row), str(found)))
                continue
            task, text, seen, visits = found
            prompts += (key := prompt(text))
            if key not in text_keys:
                text_keys[key] = None
                texts += text.encode()
                text_ends.append(len(texts))
            numbers["row"].append(row)
            numbers["task"].append(tasks.setdefault(task, len(tasks)))
            numbers["references"].append(len(seen.references))
            own = seen.all if recipe.canvas.parity else seen.all[:3]
            numbers["own"].append(xxhash.xxh3_64_intdigest(b"|".join(own)))
            pictures.update(filter(None, seen.all))
            for plan, named in visits:
                numbers["height"].append(plan.layout.height)
                numbers["width"].append(plan.layout.target_width)
                numbers["widths"].extend(plan.layout.widths[:-1])
                keys += b"".join(key or bytes(16) for key in (*named[:4], *sum(named.references, ())))
    arrays = {name: np.array(values, values.typecode) for name, values in numbers.items()}
    for name in ("height", "width"):
        arrays[name] = arrays[name].reshape(-1, recipe.variants)
    return Survey(**arrays, keys=_pairs(keys), prompt=_pairs(prompts), pictures=_pairs(b"".join(sorted(pictures))),
                  text=np.frombuffer(bytes(texts), np.uint8), text_end=np.array(text_ends, np.int64),
                  text_key=_pairs(b"".join(text_keys)), tasks=list(tasks), skipped=skipped)


def join(parts: Sequence[tuple[Any, Any]]) -> Survey:
    """One survey out of (arrays, {"tasks", "skipped"}) of rows one after the other."""
    tasks = list(dict.fromkeys(task for _, about in parts for task in about["tasks"]))
    joined = {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in Survey.ARRAYS}
    numbers = [np.array([tasks.index(task) for task in about["tasks"]], np.int32)[arrays["task"]]
               for arrays, about in parts if len(arrays["task"])]
    joined["task"] = np.concatenate([np.zeros(0, np.int32), *numbers])
    before = np.cumsum([0, *(len(arrays["text"]) for arrays, _ in parts)])
    joined["text_end"] = np.concatenate([arrays["text_end"] + start for (arrays, _), start
                                         in zip(parts, before, strict=False)])
    joined["pictures"] = _pairs(np.unique(as_keys(joined["pictures"])).tobytes())
    return Survey(**joined, tasks=tasks, skipped=[one for _, about in parts for one in about["skipped"]])


def take(survey: Survey, good: np.ndarray) -> Survey:
    """The samples that are `good` [M]."""
    visits = survey.height.shape[1]
    keys = np.repeat(good, survey.per_visit * visits)
    widths = np.repeat(good, survey.references * visits)
    parts = {name: getattr(survey, name)[good] for name in ("row", "task", "references", "height", "width", "prompt",
                                                            "own")}
    return dataclasses.replace(survey, **parts, keys=survey.keys[keys], widths=survey.widths[widths])


def as_keys(pairs: np.ndarray) -> np.ndarray:
    """[N, 2] uint64 -> [N] of 16 bytes, which sort and compare."""
    return np.ascontiguousarray(pairs).reshape(-1).view(KEY)


def ahead(pool: concurrent.futures.Executor, work: Callable[[A], B], items: Iterable[A], most: int) -> Iterator[B]:
    """`map(work, items)` in order, at most `most` of them begun and not yet taken."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _visit(source: Sequence[Sample], recipe: Recipe, row: int):
    """Task, prompt, hashes and (plan, names) of each visit; or the UserError that tells why not."""
    try:
        sample = source[row]
        seen = tiles.hashes(sample)
        plans = [recipe.visit(sample, seen, variant) for variant in range(recipe.variants)]
        return sample.task, sample.prompt, seen, [
            (plan, tiles.names(sample.task, recipe.canvas, plan, seen, recipe.encoder)) for plan in plans]
    except UserError as error:
        return error


def _pairs(joined: bytes) -> np.ndarray:
    return np.frombuffer(bytes(joined), "<u8").reshape(-1, 2)
