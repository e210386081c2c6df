"""From one safetensors layout to another, streamed, with a report that shows that nothing was lost.

Both layouts' plans meet in the rows of torch's matrices, so that a conversion is a copy of row ranges: the host holds
one chunk at a time. What was written is read back and turned into the source's layout again before it gets its name.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

from acejax.errors import UserError
from acejax.weights import keymaps, layout, save, trees
from acejax.weights.identify import KINDS, Model, open_model
from acejax.weights.keymaps import Config
from acejax.weights.layout import Piece, Shape
from acejax.weights.save import Entry
from acejax.weights.source import NAMES, Stored, Tensor, chunks, same_bits, shown

# dtype -> the least bits of a positive number that is NaN or infinity; with the sign bit, of a negative one
_NOT_FINITE = {np.dtype(np.float64): 0x7FF0_0000_0000_0000, np.dtype(np.float32): 0x7F80_0000,
               np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80,
               np.dtype(ml_dtypes.float8_e5m2): 0x7C, np.dtype(ml_dtypes.float8_e4m3fn): 0x7F}
BEHIND = 4  # tensors that reading back may be behind writing
Progress = Callable[[int], Any]


def _quiet(done: int) -> None:
    """No progress."""


@dataclasses.dataclass
class Row:
    """One written tensor.

    Attributes:
      key, shape, dtype: as written, in safetensors' words.
      sources, stored: the tensors that it was made of, and their dtype.
      xxh3: 64-bit xxHash of its bytes.
      nan, inf: how many there are.
      change: greatest absolute change of a number by the conversion of dtype; `zeros` of them became 0.
    """

    key: str
    shape: Shape
    dtype: str
    sources: tuple[str, ...]
    stored: str
    xxh3: str = ""
    nan: int = 0
    inf: int = 0
    change: float = 0.0
    zeros: int = 0


@dataclasses.dataclass
class Report:
    """What a conversion did.

    Attributes:
      model, config: what was found in `source`, in the layout `found`; `written` is the layout of `files`.
      used: source tensors that were used by exactly their number of elements.
      twins, ignored, left_over: source tensors that only repeat another, that are known and not needed (see `Model`),
        or that no part of the model has.
      exact: used tensors that come back bit for bit when what was written is read and turned back.
      rows: the written tensors, each filled by exactly its number of elements.
    """

    source: str
    model: str
    config: dict[str, Any]
    found: str
    written: str
    used: int
    twins: tuple[str, ...]
    ignored: tuple[str, ...]
    left_over: tuple[str, ...]
    exact: int
    rows: list[Row]
    files: tuple[str, ...] = ()

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Tensors that hold NaN or infinity."""
        return tuple(row.key for row in self.rows if row.nan or row.inf)

    @property
    def change(self) -> float:
        """Greatest absolute change by the conversion of dtype."""
        return max(row.change for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"not_finite": self.not_finite, "change": self.change}


def convert(model: Model, target: pathlib.Path, to: str, dtype: Any = None, prefix: str | None = None,
            progress: Progress = _quiet) -> Report:
    """Write a model in a layout, as `acejax.weights.save.save_model` would.

    Args:
      model: the source.
      target: a `.safetensors` file, or a folder that gets a `config.json` and one or more files.
      to: a layout of the model's kind.
      dtype: what to store; None keeps each tensor's own.
      prefix: what to write before every key; None is the layout's own.
      progress: called with bytes done; each byte passes twice, there and back.

    Raises:
      UserError: the target is there already or can't be written; a finite number that the dtype can't hold; a disk that
        gives back something else than was written.
    """
    prefix = keymaps.layouts_of(model.config)[to].prefixes[0] if prefix is None else prefix
    plan = _plan(model, to, dtype, prefix)
    entries = [Entry(job.row.key, job.dtype, job.row.shape) for job in plan]
    with save.beside(target) as place, concurrent.futures.ThreadPoolExecutor(1) as reader:
        reopen = functools.partial(open_model, place, type(model.config), model.config)
        check, checks = _Check(model, reopen, progress), collections.deque()

        def contents() -> Iterator[np.ndarray | Stored]:
            for written, job in itertools.pairwise([None, *plan]):
                if written:
                    checks.append(reader.submit(check, written))
                while checks and (checks[0].done() or len(checks) > BEHIND):
                    checks.popleft().result()
                yield from _contents(model, job, progress)

        files = save.write(place, model.config, entries, contents(), folder=target.suffix != ".safetensors")
        checks.append(reader.submit(check, plan[-1]))
        save.sync(files)
        for done in checks:
            done.result()
        if reopen().tensors != check.back.tensors:
            raise UserError(f"{place}: its header does not read back as it was written; is the disk sound?")
    return _report(model, to, plan, check, tuple(str(target / file.name if file != place else target)
                                                 for file in files))


def _report(model: Model, to: str, plan: list["_Job"], check: "_Check", files: tuple[str, ...] = ()) -> Report:
    used = len(model.tensors)
    return Report(str(model.path), KINDS[type(model.config)][0], dataclasses.asdict(model.config), model.layout, to,
                  used, model.twins, model.ignored, model.left_over, used - len(check.changed),
                  [job.row for job in plan], files)


def compare(model: Model, made: Model, dtype: Any = None) -> Report:
    """The report of a conversion by other means, whose result is `made`."""
    plan, check = _plan(model, made.layout, dtype, ""), _Check(model, lambda: made, _quiet)
    for job in plan:
        check(job)
    return _report(model, made.layout, plan, check)


def of_tree(path: pathlib.Path, config: Config, params: Any) -> Model:
    """Parameters in memory as a source, in the first layout of their kind."""
    try:
        keymaps.check_tree(config, params)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the parameters are not those of its config ({error})") from None
    name = next(iter(keymaps.layouts_of(config)))
    leaves = {key: np.asarray(leaf) for key, leaf in trees.flat(params).items()}
    shapes = keymaps.expected(config, name)
    parts = layout.grouped(keymaps.plan_for(config, name), "key")
    return Model(path, config, name, {key: _Made(parts[key], shape, leaves) for key, shape in shapes.items()},
                 {key: key for key in shapes})


@dataclasses.dataclass(frozen=True)
class _Made:
    """A foreign tensor made from our leaves where it is sliced."""

    copies: list[layout.Copy]
    shape: Shape
    leaves: dict[str, np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        return layout.common(self.leaves[copy.path].dtype for copy in self.copies)

    def __getitem__(self, region: tuple[slice, ...]) -> np.ndarray:
        return layout.tensor(self.copies, self.shape, self.leaves, self.dtype, region)


@dataclasses.dataclass(frozen=True)
class _Job:
    key: str
    row: Row
    dtype: np.dtype
    pieces: list[Piece]


def _plan(model: Model, to: str, dtype: Any, prefix: str) -> list[_Job]:
    """The tensors to write; no element of the source is left out or used twice, none of the target left open."""
    met = layout.meet(keymaps.plan_for(model.config, model.layout), keymaps.plan_for(model.config, to))
    jobs, used = [], dict.fromkeys(model.tensors, 0)
    for key, shape in keymaps.expected(model.config, to).items():
        for piece in met[key]:
            used[piece.source] += _size(piece.taken)
        _require(key, sum(_size(piece.given) for piece in met[key]), shape)
        sources = tuple(dict.fromkeys(piece.source for piece in met[key]))
        stored = layout.common(model.tensors[source].dtype for source in sources)
        out = np.dtype(dtype or stored)
        row = Row(prefix + key, shape, NAMES[out], tuple(model.names[source] for source in sources), NAMES[stored])
        jobs.append(_Job(key, row, out, met[key]))
    for key, tensor in model.tensors.items():
        _require(key, used[key], tensor.shape)
    return jobs


def _require(key: str, elements: int, shape: Shape) -> None:
    if elements != math.prod(shape):
        raise RuntimeError(f"the tables cover {elements} of the {math.prod(shape)} elements of {key!r}")


def _size(region: tuple[slice, ...]) -> int:
    return math.prod(part.stop - part.start for part in region)


def _contents(model: Model, job: _Job, progress: Progress) -> Iterator[np.ndarray | Stored]:
    """What to write for one tensor."""
    for piece in job.pieces:
        tensor = _rows(model.tensors[piece.source], piece.taken)
        for part in [tensor] if isinstance(tensor, Stored) and tensor.dtype == job.dtype else chunks(tensor):
            yield part if isinstance(part, Stored) else _bytes(_cast(part, job))
            progress(part.nbytes)


def _cast(chunk: np.ndarray, job: _Job) -> np.ndarray:
    if chunk.dtype == job.dtype:
        return chunk
    with np.errstate(over="ignore", invalid="ignore"):
        out = chunk.astype(job.dtype)
    if not _all_finite(out) and (~np.isfinite(out)).sum() != (~np.isfinite(chunk)).sum():
        largest = np.nanmax(np.abs(chunk.astype(np.float32)))
        raise UserError(f"{shown(job.row.sources[0])} holds numbers up to {largest:g}, beyond {job.row.dtype}; "
                        "expected another --dtype")
    return out


def look(chunk: np.ndarray, out: np.ndarray, row: Row, hashed: xxhash.xxh3_64) -> None:
    """Hash what is written, count in the row what is not finite, and measure the change."""
    hashed.update(_bytes(out))
    if not _all_finite(out):
        row.nan += int(np.isnan(out).sum())
        row.inf += int(np.isinf(out).sum())
    if out is not chunk:
        wide = np.float64 if chunk.dtype == np.float64 else np.float32
        with np.errstate(invalid="ignore"):
            change = np.abs(chunk.astype(wide) - out.astype(wide))
        row.change = max(row.change, float(np.nanmax(change, initial=0)))
        row.zeros += int(np.count_nonzero(chunk) - np.count_nonzero(out))


def _all_finite(x: np.ndarray) -> bool:
    """By two maxima over the bits, as signed and as unsigned integers: four times as fast as `np.isfinite`."""
    if not x.size:
        return True
    least, size = _NOT_FINITE[x.dtype], x.dtype.itemsize
    sign = 1 << (8 * size - 1)
    return int(x.view(f"i{size}").max()) < least and int(x.view(f"u{size}").max()) < sign + least


def _bytes(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1).view(np.uint8)


def _rows(tensor: Tensor, region: tuple[slice, ...]) -> Tensor | np.ndarray:
    """A region as a tensor of its own, still on disk where it is whole rows there."""
    whole = all(part == slice(0, size) for part, size in zip(region[1:], tensor.shape[1:], strict=True))
    if isinstance(tensor, Stored) and whole:
        return tensor.rows(region[0].start, region[0].stop)
    return np.ascontiguousarray(tensor[region])


class _Check:
    """Reads what was written, a tensor at a time, holds it against the source, and fills the tensor's row.

    Attributes:
      back: what was written, as its own header says.
      changed: source tensors that do not come back bit for bit.
    """

    def __init__(self, model: Model, reopen: Callable[[], Model], progress: Progress):
        self._model, self._reopen, self._progress = model, reopen, progress
        self.changed: set[str] = set()

    @functools.cached_property
    def back(self) -> Model:
        return self._reopen()

    @functools.cached_property
    def _pieces(self) -> dict[str, list[Piece]]:
        """The way back: for each written tensor, in order of its rows, where they go in the source's layout."""
        met = layout.meet(keymaps.plan_for(self._model.config, self.back.layout),
                          keymaps.plan_for(self._model.config, self._model.layout))
        pieces = sorted(itertools.chain(*met.values()), key=lambda piece: piece.taken[0].start)
        return layout.grouped(pieces, "source")

    def __call__(self, job: _Job) -> None:
        """Check one tensor, which is written.

        Raises:
          UserError: it is not what the source's numbers are in the written dtype.
        """
        hashed = xxhash.xxh3_64()
        _require(job.key, sum(_size(piece.taken) for piece in self._pieces[job.key]), job.row.shape)
        for piece in self._pieces[job.key]:
            for there, here in zip(chunks(_rows(self.back.tensors[job.key], piece.taken)),
                                   chunks(_rows(self._model.tensors[piece.target], piece.given)), strict=True):
                there, out = there.reshape(here.shape), _cast(here, job)  # [out, in] against [out, in, 1, 1]
                look(here, out, job.row, hashed)
                if not same_bits(there, here):
                    if not same_bits(there, out.astype(there.dtype, copy=False)):
                        raise UserError(f"{self.back.path}: {shown(job.key)} does not read back as it was written; is "
                                        "the disk sound?")
                    if not same_bits(here, there.astype(here.dtype)):
                        self.changed.add(piece.target)
                self._progress(here.nbytes)
        job.row.xxh3 = hashed.hexdigest()
