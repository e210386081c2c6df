"""Write models as safetensors that other programs read; what is written appears whole or not at all."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from acejax.errors import UserError
from acejax.model.config import AutoencoderConfig, MMDiTConfig
from acejax.weights import geometry, keymaps, layout, trees
from acejax.weights.keymaps import Config
from acejax.weights.source import NAMES, Stored, exists

SHARD = 10 * 10**9  # bytes of one file in a folder, as diffusers cuts
BLOCK = 2**24  # bytes copied at once
FLUSH = 2**28  # bytes after which the disk is set to work
_NO_KERNEL_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
METADATA = {"format": "pt"}  # transformers refuses files without a format


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    key: str
    dtype: np.dtype
    shape: layout.Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_model(path: str | os.PathLike, config: Config, params: Any, layout: str = "bfl", dtype: Any = None,
               prefix: str | None = None) -> None:
    """Write a transformer, autoencoder or text encoder; loading it gives the same numbers back.

    One foreign tensor at a time is made in memory.

    Args:
      path: a local `.safetensors` file, which is replaced where it is there; or a folder to be made, which gets a
        `config.json` and files of at most 10 GB, as diffusers and transformers read them.
      config: the model of `params`.
      params: as by its `init` or loader.
      layout: "bfl" (as FLUX and ACE++ are published) or "diffusers"; text encoders have "hf" alone.
      dtype: what to store; None stores the parameters' own.
      prefix: what to write before every key; None is the layout's own.

    Raises:
      UserError: a folder that is there already, or a path that can't be written.
      ValueError: a tree that is not the config's, or an unknown layout.
    """
    known = keymaps.layouts_of(config)
    if layout not in known:
        raise ValueError(f"layout is {layout!r}; known: {', '.join(known)}")
    keymaps.check_tree(config, params)
    entries = _entries(config, params, layout, dtype, prefix)
    contents = (tensor.reshape(-1).view(np.uint8) for _, tensor in keymaps.tensors(config, params, layout, dtype))
    path = pathlib.Path(path)
    with beside(path, replace=True) as place:
        sync(write(place, config, entries, contents, folder=path.suffix != ".safetensors"))


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays as one safetensors file, which is replaced where it is there.

    Raises:
      UserError: a path that can't be written.
    """
    with beside(pathlib.Path(path), replace=True) as place:
        write_tensors(place, tensors, metadata)


def write_tensors(place: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """As `save_tensors`, right at `place`, and on the disk when it returns."""
    entries = [Entry(key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()]
    contents = (np.ascontiguousarray(tensor).reshape(-1).view(np.uint8) for tensor in tensors.values())
    _write_header(place, entries, metadata)
    _write_file(place, entries, contents)
    sync([place])


def _entries(config: Config, params: Any, name: str, dtype: Any, prefix: str | None) -> list[Entry]:
    ours, shapes = trees.flat(params), keymaps.expected(config, name)
    prefix = keymaps.layouts_of(config)[name].prefixes[0] if prefix is None else prefix
    return [Entry(prefix + key, np.dtype(dtype or layout.common(ours[copy.path].dtype for copy in copies)), shapes[key])
            for key, copies in layout.grouped(keymaps.plan_for(config, name), "key").items()]


@contextlib.contextmanager
def beside(target: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """A place next to `target` that takes its name at the end, or leaves nothing behind after an error.

    Raises:
      UserError: the target is there already (a folder, or `replace` is not said), or can't be written.
    """
    if exists(target) and not (replace and target.is_file()):
        raise UserError(f"{target}: is there already; give another place, nothing is overwritten")
    place = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield place
        place.replace(target)
        sync([target.parent])
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def write(place: pathlib.Path, config: Config, entries: Sequence[Entry], contents: Iterable[np.ndarray | Stored],
          folder: bool) -> list[pathlib.Path]:
    """Write a file or a folder; returns the tensor files.

    `contents` are the tensors' bytes one after the other, in pieces of any size; a `Stored` stands for bytes on disk.
    Before the first of them is asked for, all headers stand and all files have their length: what is written already
    can be opened and read while the rest follows.
    """
    contents = iter(contents)
    files = _begin_folder(place, config, entries) if folder else {place: entries}
    for path, shard in files.items():
        _write_header(path, shard)
    for path, shard in files.items():
        _write_file(path, shard, contents)
    for _ in contents:  # lets a generator end, too
        raise RuntimeError(f"{place}: more bytes than its tensors have")
    return list(files)


def _begin_folder(place: pathlib.Path, config: Config, entries: Sequence[Entry]) -> dict[pathlib.Path, list[Entry]]:
    """A folder with all but the tensor files; which of these gets which tensors."""
    about = json.dumps(geometry.to_json(config), indent=2) + "\n"
    place.mkdir()
    (place / "config.json").write_text(about)
    stem = "diffusion_pytorch_model" if isinstance(config, MMDiTConfig | AutoencoderConfig) else "model"
    shards = _shards(entries)
    names = ([f"{stem}.safetensors"] if len(shards) == 1 else
             [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)])
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)},
                 "weight_map": {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}}
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {place / name: shard for name, shard in zip(names, shards, strict=True)}


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries in order, in groups of at most SHARD bytes."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_header(path: pathlib.Path, entries: Sequence[Entry], metadata: Mapping[str, str] = METADATA) -> None:
    """The start of a safetensors file (huggingface/safetensors README), and room for its numbers."""
    header: dict[str, Any] = {"__metadata__": METADATA | dict(metadata)}
    end = 0
    for entry in entries:
        header[entry.key] = {"dtype": NAMES[entry.dtype], "shape": entry.shape,
                             "data_offsets": (end, end + entry.nbytes)}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)


def _write_file(path: pathlib.Path, entries: Sequence[Entry], contents: Iterator[np.ndarray | Stored]) -> None:
    """The numbers of a file whose header is there."""
    left = sum(entry.nbytes for entry in entries)
    with path.open("r+b", buffering=0) as file, _flushing(file) as flush:
        file.seek(-left, os.SEEK_END)
        while left:
            part = next(contents)
            left -= part.nbytes
            if isinstance(part, Stored):
                _copy(part, file)
            else:
                block = memoryview(part)
                while block:  # a raw write may take less than it is given
                    block = block[file.write(block):]
            flush(part.nbytes)


@contextlib.contextmanager
def _flushing(file: io.FileIO) -> Iterator[Callable[[int], None]]:
    """To be told of bytes written: the disk gets them from time to time, while the next ones are made."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending, waiting = pool.submit(int), 0

        def flush(count: int) -> None:
            nonlocal pending, waiting
            waiting += count
            if waiting >= FLUSH and pending.done():
                pending, waiting = pool.submit(os.fsync, file.fileno()), 0

        yield flush
        pending.result()


def _copy(stored: Stored, file: io.FileIO) -> None:
    """The bytes of a tensor on disk to where a file is at, inside the kernel where it can."""
    with stored.path.open("rb", buffering=0) as source:
        done, copy = 0, _in_kernel
        while done < stored.nbytes:
            try:
                count = copy(source, file, stored.start + done, min(BLOCK, stored.nbytes - done))
            except OSError as error:
                if copy is _through_memory or error.errno not in _NO_KERNEL_COPY:
                    raise
                copy = _through_memory  # file systems that know no such copy, or not between the two
                continue
            if not count:
                raise UserError(f"{stored.path}: became shorter while it was read")
            done += count


def _in_kernel(source: io.FileIO, file: io.FileIO, start: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):  # Linux alone has it
        raise OSError(errno.ENOSYS, "no copy_file_range")
    return os.copy_file_range(source.fileno(), file.fileno(), count, start)


def _through_memory(source: io.FileIO, file: io.FileIO, start: int, count: int) -> int:
    source.seek(start)
    block = memoryview(source.read(count))
    written = 0
    while written < len(block):
        written += file.write(block[written:])
    return written


def sync(files: Iterable[pathlib.Path]) -> None:
    """Wait until the disk has them."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
