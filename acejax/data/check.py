"""A manifest held against its files, before a run costs anything: what is wrong, and what the run will see.

Each distinct file is opened once, its header and its end read; with `decode` its pixels, too.
"""

import collections
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import numpy as np

from acejax.data import buckets, pictures, prepare
from acejax.data.layout import ASPECT, CanvasConfig, Size, lay, visible
from acejax.data.manifest import Fault, Manifest, Row
from acejax.errors import UserError

TINY = 64  # pixels of a side
STRETCH = 1.03  # what nobody sees
WHITE = 127  # a mask is binarised above it
_BLOCK = 4096  # files handed to the threads at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What a file turned out to be: its upright size and, of a decoded mask, the brightest value; or a fault."""

    size: Size | None = None
    brightest: int | None = None
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
      manifest: what was checked.
      rows: the samples without a fault.
      faults, warnings: by line; a fault keeps a sample from being used, a warning does not.
      files: distinct files.
      decoded: whether pixels were looked at.
      sizes: by field, (height, width) of each use in `rows`.
      tokens: of each of `rows`, references as in training; [N].
    """

    manifest: Manifest
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    files: int
    decoded: bool
    sizes: dict[str, list[Size]]
    tokens: np.ndarray

    @property
    def samples(self) -> int:
        """Good and bad."""
        return len(self.rows) + len({fault.line for fault in self.faults})

    @property
    def buckets(self) -> tuple[int, ...]:
        return buckets.choose(self.tokens) if len(self.tokens) else ()

    def tasks(self) -> dict[str, dict[str, int]]:
        """Samples by task and number of references, {"insert": {"0-ref": 12}}."""
        found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        for row in self.rows:
            found[row.task][f"{len(row.references)}-ref"] += 1
        return {task: dict(sorted(counts.items())) for task, counts in sorted(found.items())}

    def steps(self, batch_size: int | None = None, batch_tokens: int | None = None) -> int:
        """Steps of one epoch at a number of samples, or of padded tokens, per step (rounded up)."""
        if not len(self.tokens):
            return 0
        if batch_tokens is None:
            return -(-len(self.tokens) // batch_size)
        lengths, counts = np.unique(buckets.assign(self.tokens, self.buckets), return_counts=True)
        if lengths[-1] > batch_tokens:
            raise UserError(f"a batch of {batch_tokens} tokens holds no sample of {lengths[-1]}; expected at least "
                            "that many")
        return int(np.ceil((counts / (batch_tokens // lengths)).sum()))

    def to_json(self, **more: Any) -> dict[str, Any]:
        def told(faults: Iterable[Fault]) -> list[dict[str, Any]]:
            return [{"line": fault.line, "where": self.manifest.where(fault.line), "field": fault.field,
                     "message": fault.message} for fault in faults]
        lengths, counts = np.unique(buckets.assign(self.tokens, self.buckets), return_counts=True)
        return {"manifest": self.manifest.path, "samples": self.samples, "good": len(self.rows), "files": self.files,
                "decoded": self.decoded, "faults": told(self.faults), "warnings": told(self.warnings),
                "tasks": self.tasks(), "stages": stages(self.rows),
                "sizes": {field: {name: list(size) for name, size in zip(("min", "median", "max"), spread(sizes),
                                                                         strict=True)}
                          for field, sizes in self.sizes.items()},
                "tokens": {"min": int(self.tokens.min()), "median": int(np.median(self.tokens)),
                           "max": int(self.tokens.max()), "total": int(self.tokens.sum())} if len(self.tokens) else {},
                "buckets": {int(length): int(count) for length, count in zip(lengths, counts, strict=True)},
                "padding": buckets.waste(self.tokens, self.buckets) if len(self.tokens) else 0.0} | more


def check(manifest: Manifest, config: CanvasConfig | None = None, decode: bool = False, seed: int = 0,
          advance: Callable[[int], Any] = lambda files: None) -> Report:
    """Open every file that the manifest names and judge every line.

    Args:
      manifest: its own faults are taken over.
      config: how large canvases are.
      decode: look at all pixels, and into the masks.
      seed: of the references' heights, which are drawn in training.
      advance: told how many files more are done.
    """
    seen = look({path: field == "mask" for row in manifest.rows for field, path in row.files}, decode, advance)
    good, faults, warnings = [], list(manifest.faults), []
    for row in manifest.rows:
        wrong, odd = _judged(row, seen)
        faults += [Fault(row.line, *found) for found in wrong]
        warnings += [Fault(row.line, *found) for found in odd]
        if not wrong:
            good.append(row)
    faults.sort(key=lambda fault: fault.line)
    sizes = {"target": [seen[row.target].size for row in good], "image": [seen[row.image].size for row in good
                                                                          if row.image],
             "references": [seen[path].size for row in good for path in row.references]}
    config = config or CanvasConfig()
    rng = np.random.default_rng(seed)
    tokens = np.array([tokens_of(config, row, seen, rng) for row in good], np.int64)
    return Report(manifest, tuple(good), tuple(faults), tuple(warnings), len(seen), decode,
                  {field: found for field, found in sizes.items() if found}, tokens)


def look(paths: dict[str, bool], decode: bool = False, advance: Callable[[int], Any] = lambda files: None
         ) -> dict[str, Seen]:
    """Open each file once, many at a time; `paths` says which are masks."""
    def one(item: tuple[str, bool]) -> Seen:
        path, is_mask = item
        try:
            if not decode:
                with pictures.opened(path) as file:
                    return Seen(pictures.whole(file, path))
            data = pictures.read(path)
            size = pictures.whole(data, path)
            pixels = (pictures.decode_mask if is_mask else pictures.decode)(data, path)
            return Seen(size, int(pixels.max()) if is_mask else None)
        except UserError as error:
            return Seen(fault=str(error))
    cores, seen, items = os.cpu_count() or 1, {}, iter(paths.items())
    # headers wait for the disk or a bucket; decoding takes a core and a picture's memory each
    with futures.ThreadPoolExecutor(min(8, cores) if decode else 32) as pool:
        while block := tuple(itertools.islice(items, _BLOCK)):
            for (path, _), found in zip(block, pool.map(one, block), strict=True):
                seen[path] = found
                advance(1)
    return seen


def tokens_of(config: CanvasConfig, row: Row, seen: dict[str, Seen], rng: np.random.Generator) -> int:
    """Tokens of a sample's canvas, its references' heights drawn as in training."""
    target, references = seen[row.target].size, [seen[path].size for path in row.references]
    return lay(config, target, references, [prepare.share(config, target, rng) for _ in references]).tokens


def stages(rows: Iterable[Row]) -> dict[str, int]:
    """Samples without and with references: what the two stages of training see."""
    with_references = [bool(row.references) for row in rows]
    return {"0-ref": with_references.count(False), "N-ref": with_references.count(True)}


def spread(sizes: Iterable[Size]) -> tuple[Size, Size, Size]:
    """The smallest, the median and the largest by area."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def kinds(faults: Iterable[Fault]) -> list[tuple[str, list[Fault]]]:
    """Faults with the same text but for names and numbers, the most frequent first."""
    groups = collections.defaultdict(list)
    for fault in faults:
        text = re.sub(r"^(picture|mask) .*?: ", r"\1: ", fault.message)
        text = re.sub(r"\([^()]*\)", "(...)", re.sub(r"\d[\d,.]*", "N", text))
        groups[f"{re.sub(r'[0-9]+', 'N', fault.field)}: {text}".removeprefix(": ")].append(fault)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _judged(row: Row, seen: dict[str, Seen]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(field, message) of faults and of warnings."""
    faults = [(field, seen[path].fault) for field, path in row.files if seen[path].fault]
    if row.mask and not seen[row.mask].fault:
        mask, image = seen[row.mask], seen[row.image]
        if image.size and mask.size != image.size:
            faults.append(("mask", f"is {_pixels(mask.size)} (width x height); its picture is {_pixels(image.size)}"))
        if mask.brightest is not None and mask.brightest <= WHITE:
            faults.append(("mask", f"found nothing brighter than {mask.brightest}; expected white (255) where to "
                                   "generate"))
    if faults:
        return faults, []
    warnings, target = [], seen[row.target].size
    if row.image:
        image = seen[row.image].size
        ratio = image[1] / image[0] / (target[1] / target[0])
        if max(ratio, 1 / ratio) > STRETCH:
            warnings.append(("image", f"is {_pixels(image)}, its target {_pixels(target)}: it will be stretched"))
    for field, path in row.files:
        size = seen[path].size
        if field == "mask":
            continue
        if visible(size)[2:] != size:
            warnings.append((field, f"is {_pixels(size)}: only its middle, {ASPECT}:1, is seen"))
        if min(size) < TINY:
            warnings.append((field, f"is {_pixels(size)}: less than {TINY} pixels a side"))
    return [], warnings


def _pixels(size: Size) -> str:
    return f"{size[1]} x {size[0]} pixels"
