"""Tensors on disk, seen as one mapping: a safetensors file, files with an index, a folder. Nothing is executed.

A tensor is read where it is sliced, through a memory map; its numbers never pass through another library, so that
bfloat16 and float8 arrive as they are. Format: huggingface/safetensors README (8 bytes of length, JSON header, data).
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from acejax.errors import UserError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
          "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
          "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
          "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}
FLOATS = ("F64", "F32", "F16", "BF16")
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, as the format's own library allows
CHUNK = 2**18  # numbers in flight at once: they stay in the processor's cache
MAX_AXES = 32  # numpy has no more
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # what PyTorch saves
Shape = tuple[int, ...]


class Tensor(Protocol):
    """What the rest of `weights` reads: numbers come where it is sliced."""

    shape: Shape
    dtype: np.dtype

    def __getitem__(self, region: tuple[slice, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file: its numbers start at byte `start`."""

    path: pathlib.Path
    key: str
    shape: Shape
    dtype: np.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "Stored":
        """Those rows as a tensor of its own."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        return dataclasses.replace(self, shape=(stop - start, *self.shape[1:]), start=self.start + start * width)

    def __getitem__(self, region: Any) -> np.ndarray:
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)[region]
        # A map of its own for every slice: what was read can leave memory as soon as the array is gone.
        whole = np.memmap(self.path, np.uint8, "r", self.start, (self.nbytes,))
        return np.asarray(whole).view(self.dtype).reshape(self.shape)[region]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A float8 tensor with its scale (ComfyUI's `scale_weight`): multiplied in float32, given in bfloat16."""

    stored: Tensor
    scale: float
    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> Shape:
        return self.stored.shape

    def __getitem__(self, region: Any) -> np.ndarray:
        short = self.stored[region]
        if self.scale == 1:  # exact
            return short.astype(self.dtype)
        wide = short.astype(np.float32)
        wide *= np.float32(self.scale)
        return wide.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Grown:
    """A weight [out, in] with more input columns: `blocks` are (columns of the old, first column in the new).

    What no block fills is zero.
    """

    stored: Tensor
    columns: int
    blocks: tuple[tuple[slice, int], ...]

    @property
    def shape(self) -> Shape:
        return (self.stored.shape[0], self.columns)

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    def __getitem__(self, region: Any) -> np.ndarray:
        old = self.stored[:, :]
        grown = np.zeros(self.shape, self.dtype)
        for block, first in self.blocks:
            part = old[:, block]
            grown[:, first:first + part.shape[1]] = part
        return grown[region]


@dataclasses.dataclass(frozen=True)
class Source:
    """What was opened: tensors by key, the files' metadata, and a `config.json` that stood beside them."""

    path: pathlib.Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def open_source(path: str | os.PathLike) -> Source:
    """Open a safetensors file, an index (`*.safetensors.index.json`) or a folder that holds one of them.

    Only headers are read.

    Raises:
      UserError: no such file, another format (GGUF and PyTorch pickles by name), a file cut short or with wrong
        offsets, a shard that is missing, or a folder with no or several models.
    """
    path = pathlib.Path(path)
    if exists(path) and path.is_dir():
        return open_source(_only_model(path))
    if not exists(path):
        raise UserError(f"{path}: no such file; expected a safetensors file, its index, or a folder with one")
    if path.name.endswith(".index.json"):
        tensors, metadata = _open_index(path)
    else:
        tensors, metadata = read_header(path)
    beside = path.parent / "config.json"
    return Source(path, tensors, metadata, read_json(beside) if beside.is_file() else None)


def read_json(path: pathlib.Path) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
      UserError: not readable, or no object.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON ({_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object; found {type(found).__name__}")
    return found


def read_header(path: pathlib.Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of one safetensors file, every offset checked.

    Raises:
      UserError: see `open_source`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _refuse_other_formats(path, start)
            if len(start) < 8 or length > MAX_HEADER or 8 + length > size:
                raise UserError(f"{path}: expected a whole safetensors file; found another format or one cut short "
                                f"({size:,} bytes)")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except _Duplicate as error:
        raise UserError(f"{path}: the header names {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a whole safetensors file; the header is no JSON ({_line(error)})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: expected a safetensors header; found a JSON {type(header).__name__}")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: the header's __metadata__ must map names to strings")
    tensors = {key: _entry(path, key, entry, 8 + length, size) for key, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise UserError(f"{path}: {shown(tensor.key)} starts at byte {tensor.start:,}; expected {end:,}, where the "
                            "one before ends")
        end = tensor.start + tensor.nbytes
    if end != size:
        raise UserError(f"{path}: {size:,} bytes; expected a whole safetensors file of {end:,}")
    return tensors, metadata


def _entry(path: pathlib.Path, key: str, entry: Any, data: int, size: int) -> Stored:
    def counts(value: Any, most: int) -> bool:
        return isinstance(value, list) and len(value) <= most and all(
            isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**62 for one in value)

    if (not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str)
            or not counts(entry.get("shape"), MAX_AXES) or not counts(entry.get("data_offsets"), 2)
            or len(entry["data_offsets"]) != 2
            or math.prod(max(1, extent) for extent in entry["shape"]) >= 2**62):
        raise UserError(f"{path}: {shown(key)} has no valid dtype, shape and data_offsets in the header")
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: {shown(key)} is stored as {shown(entry['dtype'])}; expected one of "
                        f"{', '.join(DTYPES)}")
    dtype, shape, (start, stop) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    stored = Stored(path, key, shape, dtype, data + start)
    if data + stop > size:
        raise UserError(f"{path}: expected a whole safetensors file; found one cut short: {shown(key)} ends at "
                        f"byte {data + stop:,} of {size:,}")
    if stop - start != stored.nbytes:
        raise UserError(f"{path}: {shown(key)} of shape {shape} needs {stored.nbytes:,} bytes; the header gives it "
                        f"{stop - start:,}")
    return stored


def _open_index(path: pathlib.Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of all shards; the index must name every one of them, each in its place."""
    weight_map = read_json(path).get("weight_map")
    if (not isinstance(weight_map, dict) or not weight_map
            or not all(isinstance(name, str) and pathlib.PurePath(name).name == name for name in weight_map.values())):
        raise UserError(f"{path}: expected a weight_map from tensors to files beside the index")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        if not exists(path.parent / name):
            raise UserError(f"{path}: the shard {shown(name)} is not there")
        shard, notes = read_header(path.parent / name)
        for key in shard:
            if weight_map.get(key) != name:
                raise UserError(f"{path}: {shown(key)} stands in {name!r}; the index says {shown(weight_map.get(key))}")
        tensors |= shard
        metadata |= notes
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise UserError(f"{path}: {shown(missing[0])} is missing in {weight_map[missing[0]]!r}, where the index has it")
    return tensors, metadata


def _only_model(folder: pathlib.Path) -> pathlib.Path:
    names = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    indices = [path for path in names if path.name.endswith(".safetensors.index.json")]
    files = indices or [path for path in names if path.suffix == ".safetensors"]
    if len(files) != 1:
        files = files or [path for path in names if path.suffix in PICKLES]
        found = ", ".join(file.name for file in files[:3]) or "none"
        raise UserError(f"{folder}: expected one safetensors file or index in this folder; found {found}"
                        + (" and more" if len(files) > 3 else ""))
    return files[0]


def exists(path: pathlib.Path) -> bool:
    """Whether a path is there; one that no file system takes is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """A tensor's rows in order, about CHUNK numbers at a time."""
    array = tensor[...] if isinstance(tensor, Stored) else tensor  # one memory map serves all
    step = max(1, CHUNK // max(1, math.prod(array.shape[1:])))
    for start in range(0, array.shape[0], step):
        yield np.ascontiguousarray(array[start:start + step])


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two contiguous arrays hold the same bytes."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    word = np.uint8 if first.nbytes % 8 else np.uint64
    return bool((first.reshape(-1).view(word) == second.reshape(-1).view(word)).all())


def shown(key: Any) -> str:
    """A name out of a file, fit for a message: quoted, escaped, of bounded length."""
    text = ascii(key)
    return text if len(text) <= 200 else text[:190] + "..." + text[-1]


def _refuse_other_formats(path: pathlib.Path, start: bytes) -> None:
    if start[:4] == b"GGUF":
        raise UserError(f"{path}: found a GGUF file, whose quantised blocks are not read here; expected safetensors in "
                        "float8, bfloat16, float16 or float32")
    if path.suffix in PICKLES or start[:2] == b"PK":
        raise UserError(f"{path}: found a PyTorch pickle; expected safetensors (`acejax convert` turns one into the "
                        "other, with torch, and without executing it)")


class _Duplicate(ValueError):
    pass


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Duplicate(shown(name))
        found[name] = value
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
