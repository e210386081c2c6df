"""From one safetensors layout to another, streamed, with a report that shows that nothing was lost.

Both layouts' plans meet in the rows of torch's matrices, so that a conversion is a copy of row ranges: the host holds
one chunk at a time. What was written is read back and turned into the source's layout again before it gets its name.
"""

import concurrent.futures
import dataclasses
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
      UserError: the target is there already or can't be written; a finite number that the dtype can't hold.
    """
    prefix = keymaps.layouts_of(model.config)[to].prefixes[0] if prefix is None else prefix
    plan = _plan(model, to, dtype, prefix)
    entries = [Entry(job.row.key, job.dtype, job.row.shape) for job in plan]
    with save.beside(target) as place:
        files = save.write(place, model.config, entries, _contents(model, plan, progress),
                           folder=target.suffix != ".safetensors")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # read back while the disk still writes
            synced = pool.submit(save.sync, files)
            exact = _come_back(model, open_model(place, type(model.config), model.config), plan, progress)
            synced.result()
    return _report(model, to, plan, exact, tuple(str(target / file.name if file != place else target)
                                                 for file in files))


def _report(model: Model, to: str, plan: list["_Job"], exact: int, files: tuple[str, ...] = ()) -> Report:
    return Report(str(model.path), KINDS[type(model.config)][0], dataclasses.asdict(model.config), model.layout, to,
                  len(model.tensors), model.twins, model.ignored, model.left_over, exact, [job.row for job in plan],
                  files)


def compare(model: Model, made: Model, dtype: Any = None) -> Report:
    """The report of a conversion by other means, whose result is `made`."""
    plan = _plan(model, made.layout, dtype, "")
    for _ in _contents(model, plan, _quiet):
        pass
    return _report(model, made.layout, plan, _come_back(model, made, plan, _quiet))


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
        jobs.append(_Job(row, out, met[key]))
    for key, tensor in model.tensors.items():
        _require(key, used[key], tensor.shape)
    return jobs


def _require(key: str, elements: int, shape: Shape) -> None:
    if elements != math.prod(shape):
        raise RuntimeError(f"the tables cover {elements} of the {math.prod(shape)} elements of {key!r}")


def _size(region: tuple[slice, ...]) -> int:
    return math.prod(part.stop - part.start for part in region)


def _contents(model: Model, plan: list[_Job], progress: Progress) -> Iterator[np.ndarray | Stored]:
    """What to write; while a part is written, another thread looks at its numbers for the row."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for job in plan:
            hashed = xxhash.xxh3_64()
            for piece in job.pieces:
                tensor = _rows(model.tensors[piece.source], piece.taken)
                if isinstance(tensor, Stored) and tensor.dtype == job.dtype:
                    looked = pool.submit(_look_through, tensor, job.row, hashed)
                    yield tensor
                    looked.result()
                    progress(tensor.nbytes)
                    continue
                for chunk in chunks(tensor):
                    out = chunk if chunk.dtype == job.dtype else _cast(chunk, job)
                    looked = pool.submit(look, chunk, out, job.row, hashed)
                    yield _bytes(out)
                    looked.result()
                    progress(chunk.nbytes)
            job.row.xxh3 = hashed.hexdigest()


def _look_through(tensor: Stored, row: Row, hashed: xxhash.xxh3_64) -> None:
    for chunk in chunks(tensor):
        look(chunk, chunk, row, hashed)


def _cast(chunk: np.ndarray, job: _Job) -> np.ndarray:
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


def _come_back(model: Model, back: Model, plan: list[_Job], progress: Progress) -> int:
    """How many source tensors come back bit for bit from what was written.

    Raises:
      UserError: what was written is not what the source's numbers are in the written dtype.
    """
    met = layout.meet(keymaps.plan_for(model.config, back.layout), keymaps.plan_for(model.config, model.layout))
    written = {key: job.dtype for key, job in zip(keymaps.expected(model.config, back.layout), plan, strict=True)}

    def comes_back(key: str, pieces: list[Piece]) -> bool:
        same = True
        for piece in pieces:
            for there, here in zip(chunks(_rows(back.tensors[piece.source], piece.taken)),
                                   chunks(_rows(model.tensors[key], piece.given)), strict=True):
                there = there.reshape(here.shape)  # [out, in] against [out, in, 1, 1]
                if not same_bits(there, here):
                    if not same_bits(there, here.astype(written[piece.source]).astype(there.dtype, copy=False)):
                        raise UserError(f"{back.path}: {shown(piece.source)} does not read back as it was written; is "
                                        "the disk sound?")
                    same = same and same_bits(here, there.astype(here.dtype))
                progress(here.nbytes)
        return same

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return sum(pool.map(comes_back, met, met.values()))
