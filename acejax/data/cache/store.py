"""A folder of arrays that are written once and found by 16-byte keys, for what is costly to make and read at random.

A shard is a safetensors file that never changes. For each kind of rows ("latents.64x64") it has an array [n, ...] and,
before it, "latents.64x64.keys" [n, 2] uint64; its name is a hash of its keys. A row is read by its place in the file,
without a map: pages that a map has touched count as the process's own memory.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from etils import epath

from acejax.errors import UserError
from acejax.weights.source import DTYPES, NAMES

KEY = np.dtype("S16")
NONE = b""  # no key
KEYS = ".keys"
PART = ".part"  # ends the name of a file that is being written
OPEN = 64  # shards that a reader keeps open
AGAIN = "remove it and run `acejax data cache` again"


class Array(NamedTuple):
    """An array inside a safetensors file: its numbers start at byte `start`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write(path: epath.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> int:
    """Write a safetensors file, beside and renamed; returns its bytes. `metadata` is kept as one JSON text.

    Raises:
      UserError: a path that can't be written.
    """
    # wide numbers first: so each array starts at a multiple of its numbers' size
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"acejax": json.dumps(metadata, sort_keys=True)}}
    end = 0
    for name, array in arrays.items():
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    place = path.parent / f".{path.name}.{os.getpid()}{PART}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            file.flush()
            with contextlib.suppress(OSError, AttributeError):  # a file that is none of the system's
                os.fsync(file.fileno())
        place.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from None
    return 8 + len(text) + end


def header(file: BinaryIO, path: epath.Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and metadata of a file that `write` wrote.

    Raises:
      UserError: another file, or one cut short.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(min(length, size)))
        metadata = json.loads(found.pop("__metadata__")["acejax"])
        arrays = {name: Array(np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]),
                              8 + length + entry["data_offsets"][0]) for name, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no whole file of acejax's features; {AGAIN}") from None
    if size != max((array.start + array.nbytes for array in arrays.values()), default=8 + length):
        raise UserError(f"{path}: cut short ({size:,} bytes); {AGAIN}")
    return arrays, metadata


def read(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays and the metadata of a file; a local one is mapped, so that processes share what they look at.

    Raises:
      UserError: no such file, another one, or one cut short.
    """
    with _opened(path) as file:
        arrays, metadata = header(file, path)
        local = _descriptor(file) is not None
        if local:
            whole = np.memmap(file, np.uint8, "r")
        else:
            file.seek(0)
            whole = np.frombuffer(file.read(), np.uint8)
    return {name: whole[array.start:array.start + array.nbytes].view(array.dtype).reshape(array.shape)
            for name, array in arrays.items()}, metadata


class Table(NamedTuple):
    """Where every row of a store is, by key.

    Attributes:
      keys: [K] sorted.
      shard, start: [K] number of its shard and its first byte there.
      kind: [K] an index into `kinds`.
      shards, kinds: their names.
      nbytes: of all shards.
    """

    keys: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    kind: np.ndarray
    shards: tuple[str, ...]
    kinds: tuple[str, ...]
    nbytes: int

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key in this table, -1 where it is not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)


class Store:
    """The shards below a folder."""

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder) / "shards"

    def clean(self) -> None:
        """Remove what a killed run was writing."""
        for path in self._paths(PART):
            path.unlink(missing_ok=True)

    def add(self, rows: Mapping[str, Sequence[tuple[bytes, np.ndarray]]]) -> int:
        """Write a shard with (key, row) pairs of each kind; rows of a kind have one shape and dtype. Returns bytes."""
        arrays, name = {}, xxhash.xxh3_128()
        for kind, pairs in sorted(rows.items()):
            joined = b"".join(key for key, _ in pairs)
            name.update(joined)
            arrays[kind + KEYS] = np.frombuffer(joined, "<u8").reshape(-1, 2)
            arrays[kind] = np.stack([row for _, row in pairs])
        return write(self.folder / f"{name.hexdigest()}.safetensors", arrays, {})

    def table(self) -> Table:
        """Read the keys of all shards.

        Raises:
          UserError: a shard that is damaged.
        """
        paths = sorted(self._paths(".safetensors"), key=lambda path: path.name)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(_places, paths))
        arrays = [(number, *rows) for number, part in enumerate(parts) for rows in part[0]]
        kinds = {kind: number for number, kind in enumerate(sorted({kind for _, kind, _, _ in arrays}))}
        keys = np.concatenate([np.zeros(0, KEY), *(keys for _, _, keys, _ in arrays)])
        start = np.concatenate([np.zeros(0, np.int64), *(starts for _, _, _, starts in arrays)])
        shard, kind = (np.repeat(np.array(numbers, np.int32), [len(keys) for _, _, keys, _ in arrays])
                       for numbers in zip(*((number, kinds[kind]) for number, kind, _, _ in arrays), strict=True)
                       ) if arrays else (np.zeros(0, np.int32),) * 2
        keys, first = np.unique(keys, return_index=True)
        return Table(keys, shard[first], start[first], kind[first], tuple(path.name for path in paths), tuple(kinds),
                     sum(size for _, size in parts))

    def _paths(self, suffix: str) -> list[epath.Path]:
        if not self.folder.exists():
            return []
        return [path for path in self.folder.iterdir() if path.name.endswith(suffix)]


class Reader:
    """Rows of shards by their place; a bounded number of files stays open, none crosses into another process."""

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder) / "shards"
        self._open = functools.lru_cache(OPEN)(self._open_shard)

    def read(self, shard: str, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A row that starts at a byte of a shard.

        Raises:
          UserError: the shard is not there or ends before.
        """
        row = np.empty(shape, dtype)
        into = memoryview(row.reshape(-1).view(np.uint8))
        file, lock = self._open(shard)  # kept here: a file that others drop meanwhile is closed after the reading
        descriptor, done = _descriptor(file), 0
        try:
            if descriptor is None:
                with lock:
                    file.seek(start)
                    data = file.read(len(into))
                    done = len(data)
                    into[:done] = data
            else:
                while done < len(into) and (count := os.preadv(descriptor, [into[done:]], start + done)):
                    done += count
        except OSError as error:
            raise UserError(f"{self.folder / shard}: cannot be read ({error})") from None
        if done < len(into):
            raise UserError(f"{self.folder / shard}: ends before a row that the index has there; {AGAIN}")
        return row

    def _open_shard(self, shard: str) -> tuple[BinaryIO, threading.Lock]:
        return _opened(self.folder / shard), threading.Lock()

    def __reduce__(self):
        return Reader, (self.folder.parent,)


def _opened(path: epath.Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `acejax data cache` again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _descriptor(file: BinaryIO) -> int | None:
    try:
        return file.fileno()
    except (OSError, AttributeError):  # a file that is none of the system's
        return None


def _places(path: epath.Path) -> tuple[list[tuple[str, np.ndarray, np.ndarray]], int]:
    """For each kind of a shard its keys and the first byte of each row; and the file's size."""
    found = []
    with _opened(path) as file:
        arrays, _ = header(file, path)
        for kind in (name.removesuffix(KEYS) for name in arrays if name.endswith(KEYS)):
            place, rows = arrays[kind + KEYS], arrays[kind]
            file.seek(place.start)
            keys = np.frombuffer(file.read(place.nbytes), KEY)
            found.append((kind, keys, rows.start + np.arange(len(keys)) * (rows.nbytes // len(keys))))
        return found, file.seek(0, os.SEEK_END)
