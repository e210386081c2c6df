"""One split's samples into array_record files, in this process or in several; what is there already is kept.

A file of a split counts as written when its note (`.building/SPLIT-00003.json`) is there, which comes last.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from array_record.python import array_record_module
from etils import epath

from acejax.data import pictures, written
from acejax.data.dataset import first_line, serialize
from acejax.data.dataset_folder import BUILDING
from acejax.data.sample import Sample
from acejax.errors import UserError

# A record a chunk, for random access; pictures are compressed already, and zstd would double the time.
OPTIONS = "group_size:1,uncompressed"
LOOK = 0.2  # seconds between two looks at the workers
BLOCK = 2**24  # bytes copied at once

Note = dict[str, Any]
Progress = Callable[[int, int], None]  # samples and bytes since the last call


@dataclasses.dataclass(frozen=True)
class Job:
    """A split to be written.

    Attributes:
      folder: the dataset's, as text.
      name, split: of the dataset.
      source: its samples.
      shards: number of files.
      skip_broken: leave samples out whose pictures are missing or broken, instead of stopping.
    """

    folder: str
    name: str
    split: str
    source: Sequence[Sample]
    shards: int
    skip_broken: bool

    def path(self, shard: int) -> epath.Path:
        return epath.Path(self.folder) / f"{self.name}-{self.split}.array_record-{shard:05d}-of-{self.shards:05d}"

    def note(self, shard: int) -> epath.Path:
        return epath.Path(self.folder) / BUILDING / f"{self.split}-{shard:05d}.json"

    def samples(self, shard: int) -> range:
        """The indices of a file's samples; files differ by one sample at most."""
        return range(*(len(self.source) * number // self.shards for number in (shard, shard + 1)))


def write(job: Job, todo: Sequence[int], workers: int, progress: Progress) -> None:
    """Write the files `todo` in `workers` processes; 1 is this one.

    Raises:
      UserError: a sample that can't be read or a place that can't be written; the files that are done stay.
    """
    if min(workers, len(todo)) <= 1:
        for shard in todo:
            write_shard(job, shard, progress)
        return
    context = _context()
    counts = context.Array("q", 3)  # samples, bytes, whether to stop
    try:
        pickle.dumps(job.source)
    except Exception as error:
        raise UserError(f"{type(job.source).__name__}: a source that cannot be pickled ({error}) can be built in one "
                        "process only: workers=1") from error
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), context, _start, (job, counts))
    with _told(counts, progress) as tell:
        pending = {pool.submit(_shard, shard) for shard in todo}
        try:
            while pending:
                done, pending = concurrent.futures.wait(pending, LOOK, concurrent.futures.FIRST_COMPLETED)
                tell()
                for future in done:
                    future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(f"{job.folder}: a worker process did not start or died, most likely for want of memory; "
                            "the same command goes on with the files that are missing; try fewer workers") from None
        finally:
            counts[2] = 1
            pool.shutdown(cancel_futures=True)


def write_shard(job: Job, shard: int, progress: Progress) -> None:
    """Write one file and its note: {"records", "bytes", "pictures" (their bytes), "skipped" (messages)}.

    Raises:
      UserError: as `write`.
    """
    note: Note = {"records": 0, "bytes": 0, "pictures": 0, "skipped": []}
    final = job.path(shard)
    try:
        with _place(final, job.note(shard).parent) as place:
            writer = array_record_module.ArrayRecordWriter(str(place), OPTIONS)
            try:
                for index in job.samples(shard):
                    _add(job, index, writer, note, progress)
            finally:
                writer.close()
            if (records := _records(place)) != note["records"]:
                raise OSError(f"{records} of {note['records']} records arrived")
            _sync(place)
            note["bytes"] = place.stat().st_size
    except (RuntimeError, OSError) as error:  # array_record's errors are RuntimeErrors
        raise UserError(f"{final}: cannot be written ({first_line(error)}); the same command goes on with the files "
                        "that are missing") from error
    write_json(job.note(shard), note)


def write_json(path: epath.Path, content: Any) -> None:
    """Whole or not at all."""
    written.write(path, json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """None where it is not there, or not whole."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _add(job: Job, index: int, writer: Any, note: Note, progress: Progress) -> None:
    try:
        sample = _read(job.source, index)
        size = _checked(sample)
        record = serialize(sample)
    except UserError as error:
        if not job.skip_broken:
            raise
        note["skipped"].append(str(error))
        progress(1, 0)
        return
    writer.write(record)
    note["records"] += 1
    note["pictures"] += size
    progress(1, size)


def _read(source: Sequence[Sample], index: int) -> Sample:
    try:
        return source[index]
    except (OSError, RuntimeError) as error:
        raise UserError(f"sample {index}: cannot be read ({first_line(error)})") from error


def _checked(sample: Sample) -> int:
    """The bytes of a sample's pictures, each looked at: a broken one would be found in the midst of training."""
    named = {"target": sample.target, "image": sample.image, "mask": sample.mask} | {
        f"reference {number}": data for number, data in enumerate(sample.references, 1)}
    sizes = {field: pictures.whole(data, f"{sample.name} ({field})") for field, data in named.items()
             if data is not None}
    if "image" in sizes and "mask" in sizes:
        pictures.check_mask(sizes["mask"], sizes["image"], f"of {sample.name}")
    return sum(len(data) for data in named.values() if data is not None)


@contextlib.contextmanager
def _place(final: epath.Path, building: epath.Path) -> Iterator[pathlib.Path]:
    """A local file to write that becomes `final`: renamed, or copied to a bucket."""
    if "://" in str(final):
        with tempfile.TemporaryDirectory(prefix="acejax-") as folder:
            place = pathlib.Path(folder) / final.name
            yield place
            with place.open("rb") as source, final.open("wb") as target:
                shutil.copyfileobj(source, target, BLOCK)
        return
    place = pathlib.Path(building) / f"{final.name}.{os.getpid()}.part"
    try:
        yield place
        place.replace(final)
    finally:
        place.unlink(missing_ok=True)


def _records(place: pathlib.Path) -> int:
    """What a reader finds; of a file cut off, none."""
    reader = array_record_module.ArrayRecordReader(str(place))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _sync(place: pathlib.Path) -> None:
    """On the disk before it gets its name: a note must not outlive what it speaks of."""
    file = os.open(place, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _told(counts: Any, progress: Progress) -> Iterator[Callable[[], None]]:
    """What the workers count, handed on as differences."""
    seen = [0, 0]

    def tell() -> None:
        now = list(counts[:2])
        progress(now[0] - seen[0], now[1] - seen[1])
        seen[:] = now

    try:
        yield tell
    finally:
        tell()


def _context() -> multiprocessing.context.BaseContext:
    """Workers fork off a server that has imported this file once; jax's threads would not survive a fork of ours."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


_work: tuple[Job, Any] | None = None  # of a worker process


def _start(job: Job, counts: Any) -> None:
    """A worker starts: Ctrl-C is its parent's affair, and it ends when its parent is gone, however that ended."""
    global _work
    _work = job, counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _shard(shard: int) -> None:
    job, counts = _work

    def progress(samples: int, size: int) -> None:
        with counts.get_lock():
            counts[0] += samples
            counts[1] += size
            stop = counts[2]
        if stop:
            raise UserError("stopped")

    write_shard(job, shard, progress)
