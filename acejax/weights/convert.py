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
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import keymaps, layout, lora_formats, lora_pairs, save
from acejax.weights.identify import KINDS, Model, open_model
from acejax.weights.keymaps import Config
from acejax.weights.layout import Piece, Shape
from acejax.weights.save import Entry
from acejax.weights.source import FLOATS, NAMES, Stored, Tensor, open_source

CHUNK = 2**20  # numbers in flight at once: they stay in the processor's cache
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
      change: greatest absolute change of a number by the conversion of dtype.
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


@dataclasses.dataclass
class Report:
    """What a conversion did.

    Attributes:
      model, config: what was found in `source`, in the layout `found`; `written` is the layout of `files`.
      used: source tensors that were used by exactly their number of elements.
      twins, left_over: source tensors that only repeat another, or that no part of the model has.
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
        files = save.write(place, model.config, entries, _contents(model, plan, progress))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # read back while the disk still writes
            synced = pool.submit(save.sync, files)
            exact = _come_back(model, open_model(place, type(model.config), model.config), progress)
            synced.result()
        if exact < len(model.tensors) and all(row.dtype == row.stored for row in (job.row for job in plan)):
            raise UserError(f"{target}: what was written does not read back as it was; is the disk sound?")
    return _report(model, to, plan, exact, tuple(str(target / file.name if file != place else target)
                                                 for file in files))


def _report(model: Model, to: str, plan: list["_Job"], exact: int, files: tuple[str, ...] = ()) -> Report:
    return Report(str(model.path), KINDS[type(model.config)][0], dataclasses.asdict(model.config), model.layout, to,
                  len(model.tensors), model.twins, model.left_over, exact, [job.row for job in plan], files)


def convert_lora(source: pathlib.Path, target: pathlib.Path, to: str, config: MMDiTConfig, dtype: Any = None) -> Report:
    """Write a LoRA file as "comfy" or "diffusers".

    The report's `exact` counts the tensors of the modules to which what was written adds the same, bit for bit, once
    its modules are the source's again. An alpha that goes into the metadata counts as a source of its module's B.

    Raises:
      UserError: what `acejax.load_lora` refuses, a target that is there already or can't be written, a dtype that no
        LoRA is stored as, or a number that the dtype can't hold.
    """
    if dtype is not None and NAMES[np.dtype(dtype)] not in FLOATS:
        raise UserError(f"{source}: a LoRA is not stored as {NAMES[np.dtype(dtype)]}; expected --dtype float32, "
                        "bfloat16 or float16")
    if target.exists():
        raise UserError(f"{target}: is there already; give another place, nothing is overwritten")
    found = lora_formats.read_lora(source, config)
    lora = unflatten_dict(lora_pairs.from_foreign(config, found.layout, found.pairs), sep="/")
    made, metadata = lora_formats.export(config, lora, to, dtype)
    rows = _lora_rows(source, found, made, layout.meet(lora_pairs.kernels(config, found.layout),
                                                       lora_pairs.kernels(config, lora_formats.LAYOUTS[to])))
    with save.beside(target) as place:
        save.write_tensors(place, {tensor.key: tensor.stored for tensor in made}, metadata)
        there = open_source(place).tensors
        if not all(_same(tensor.stored, there[tensor.key][...]) for tensor in made):
            raise UserError(f"{target}: what was written does not read back as it was; is the disk sound?")
        again = lora_formats.read_lora(place, config)
        back = unflatten_dict(lora_pairs.from_foreign(config, again.layout, again.pairs), sep="/")
        same = lora_pairs.adds_the_same(config, found.layout, lora, back)
        if not all(same[key] for key in same.keys() - found.roles.keys()):
            raise RuntimeError(f"{target}: would change a layer that {source} leaves alone")
    return Report(str(source), "FLUX LoRA", dataclasses.asdict(config), found.layout, to, len(found.tensors), (), (),
                  sum(len(roles) for key, roles in found.roles.items() if same[key]), rows, (str(target),))


def _lora_rows(source: pathlib.Path, found: lora_formats.Found, made: list[lora_formats.Made],
               met: dict[str, list[Piece]]) -> list[Row]:
    """A row for each tensor of a LoRA to be written; `met` is the weights' meeting of the two layouts."""
    rows = []
    alphas = any(tensor.role == "alpha" for tensor in made)
    for tensor in made:
        weights = [key for key in dict.fromkeys(piece.source for piece in met[tensor.weight]) if key in found.roles]
        if not tensor.held:
            raise _beyond(source, found, tensor, weights)
        modules = [found.roles[key] for key in weights]
        factors = [roles[tensor.role] for roles in modules if tensor.role in roles]
        more = [roles["alpha"] for roles in modules if "alpha" in roles and tensor.role == "up" and not alphas]
        name = NAMES[tensor.stored.dtype]
        stored = NAMES[layout.common(found.tensors[key].dtype for key in factors)] if factors else name
        row, hashed = Row(tensor.key, tensor.stored.shape, name, (*factors, *more), stored), xxhash.xxh3_64()
        _look(tensor.exact, tensor.stored, row, hashed)
        rows.append(dataclasses.replace(row, xxh3=hashed.hexdigest()))
    return rows


def _beyond(source: pathlib.Path, found: lora_formats.Found, tensor: lora_formats.Made, weights: list[str]
            ) -> UserError:
    """The error for a tensor that its dtype can't hold, by the source tensor that has the most to do with it."""
    tops = {}
    for weight in weights:
        key, scale = found.roles[weight].get(tensor.role, found.roles[weight]["up"]), found.pairs[weight][2][0]
        top = float(np.abs(found.tensors[key].astype(np.float64)).max())
        tops[key] = top * abs(float(scale)) if tensor.role == "up" else top
    largest = float(np.abs(tensor.exact.astype(np.float64)).max())
    wanted = "a smaller alpha" if tensor.role == "alpha" else "another --dtype"
    return UserError(f"{source}: {lora_formats.shown(max(tops, key=tops.get))} gives numbers up to {largest:g}, beyond "
                     f"{NAMES[tensor.stored.dtype]}; expected {wanted}")


def compare(model: Model, made: Model, dtype: Any = None) -> Report:
    """The report of a conversion by other means, whose result is `made`."""
    plan = _plan(model, made.layout, dtype, "")
    for _ in _contents(model, plan, _quiet):
        pass
    return _report(model, made.layout, plan, _come_back(model, made, _quiet))


def of_tree(path: pathlib.Path, config: Config, params: Any) -> Model:
    """Parameters in memory as a source, in the first layout of their kind."""
    keymaps.check_tree(config, params)
    name = next(iter(keymaps.layouts_of(config)))
    leaves = {key: np.asarray(leaf) for key, leaf in flatten_dict(params, sep="/").items()}
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
                for chunk in _chunks(tensor):
                    out = chunk if chunk.dtype == job.dtype else _cast(chunk, job)
                    looked = pool.submit(_look, chunk, out, job.row, hashed)
                    yield _bytes(out)
                    looked.result()
                    progress(chunk.nbytes)
            job.row.xxh3 = hashed.hexdigest()


def _look_through(tensor: Stored, row: Row, hashed: xxhash.xxh3_64) -> None:
    for chunk in _chunks(tensor):
        _look(chunk, chunk, row, hashed)


def _cast(chunk: np.ndarray, job: _Job) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        out = chunk.astype(job.dtype)
    if not _all_finite(out) and (~np.isfinite(out)).sum() != (~np.isfinite(chunk)).sum():
        raise UserError(f"{job.row.sources[0]!r} holds numbers up to {np.nanmax(np.abs(chunk.astype(np.float32))):g}, "
                        f"beyond {job.row.dtype}; expected another --dtype")
    return out


def _look(chunk: np.ndarray, out: np.ndarray, row: Row, hashed: xxhash.xxh3_64) -> None:
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


def _chunks(tensor: Tensor | np.ndarray) -> Iterator[np.ndarray]:
    """A tensor's rows in order, about CHUNK numbers at a time."""
    array = tensor[...] if isinstance(tensor, Stored) else tensor  # one memory map serves all
    step = max(1, CHUNK // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), step):
        yield array[start:start + step]


def _come_back(model: Model, back: Model, progress: Progress) -> int:
    """How many source tensors come back bit for bit from what was written."""
    met = layout.meet(keymaps.plan_for(model.config, back.layout), keymaps.plan_for(model.config, model.layout))
    exact = 0
    for key, pieces in met.items():
        same = True
        for piece in pieces:
            for there, here in zip(_chunks(_rows(back.tensors[piece.source], piece.taken)),
                                   _chunks(_rows(model.tensors[key], piece.given)), strict=True):
                same = same and _same(here, there.astype(here.dtype, copy=False))
                progress(here.nbytes)
        exact += same
    return exact


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    word = np.uint8 if first.nbytes % 8 else np.uint64
    return bool((_bytes(first).view(word) == _bytes(second).view(word)).all())
