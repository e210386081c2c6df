"""`build`: samples become a TFDS dataset, in parallel, and a build that was cut off goes on where it was.

Below DATA_DIR/NAME/VERSION/ files are written one by one, and `.building/` keeps what each split is being made of and
which files are done. The dataset is there when `dataset_info.json` is, which is renamed into place last.
"""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
import xxhash
from etils import epath

from acejax.data.dataset import FEATURES
from acejax.data.dataset_folder import BUILDING, INFO
from acejax.data.sample import Sample
from acejax.data.shards import Job, Note, read_json, write, write_json
from acejax.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NAME = "condition_units"
RECORD = "acejax_build.json"  # beside dataset_info.json: what each split was made of
SHARD = 2**28  # bytes wanted in a file
LEAST_SHARD = 2**23  # bytes below which no file is split for the sake of workers
FEW, MANY = 16, 512  # files wanted for parallel work, and at most: a reader holds them all open
LOOKED_AT = 16  # samples whose size is taken for everyone's
REMOTE = ("gs://",)  # where array_record reads beside local disks

Progress = Callable[[str, int, int, int], None]  # split, samples done, samples in all, bytes of pictures read


def build(data_dir: epath.PathLike, splits: Mapping[str, Sequence[Sample]], *, name: str = NAME,
          version: str = "1.0.0", workers: int = 1, shards: int | None = None, skip_broken: bool = False,
          overwrite: bool = False, progress: Progress | None = None) -> epath.Path:
    """Write samples as the TFDS dataset DATA_DIR/NAME/VERSION; returns that folder.

    Splits that stand there already are left alone, whether they are among `splits` or not; files of a build that was
    cut off are kept. The content does not depend on `workers`.

    Args:
      data_dir: a local folder or gs://.
      splits: the samples of each split. With several workers a source must pickle. A source that can tell what a
        sample is made of without reading it has a method `fingerprint(index) -> str`.
      name, version: of the dataset.
      workers: processes that read and write; 1 is this one.
      shards: files of each split; by default about 256 MB each, at least 16 where there is enough, at most 512.
      skip_broken: leave samples out whose pictures are missing or broken, instead of stopping at the first.
      overwrite: write these splits anew where they stand already.
      progress: called as the work goes on.

    Raises:
      UserError: a broken sample, other samples than those the dataset was made or begun with, a place that can't be
        written, or another build at work there.
    """
    folder = _folder(data_dir, name, version, splits)
    with _alone(folder):
        if overwrite:
            _remove(folder, name, splits)
        jobs = {split: _job(folder, name, split, source, shards, skip_broken) for split, source in splits.items()}
        jobs = {split: job for split, job in jobs.items() if job is not None}
        for job in jobs.values():
            _write(job, workers, progress)
        if jobs:
            _finish(folder, name, version, jobs)
        _clear(folder, splits)
    return folder


def record(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """What was written, by split; empty for datasets of other programs.

    {"samples" (given), "records", "bytes", "pictures" (their bytes), "skipped" (messages), "source", "fingerprints"
    (one for each file)}
    """
    return read_json(epath.Path(folder) / RECORD) or {}


def _job(folder: epath.Path, name: str, split: str, source: Sequence[Sample], shards: int | None,
         skip_broken: bool) -> Job | None:
    """The split as a job; None where it is done. What it is made of is written down before anything else is.

    Raises:
      UserError: the split was made, or begun, of other samples.
    """
    if not len(source):
        raise UserError(f"split {split!r}: no samples in its source")
    done, plan = record(folder).get(split), folder / BUILDING / f"{split}.json"
    there = split in _splits(folder)
    if there and done is None:
        raise UserError(f"{folder}: split {split!r} is there already, and was not built by acejax; give another name "
                        "or data_dir")
    begun = done if there else read_json(plan)
    shards = shards and min(shards, len(source))
    job = Job(str(folder), name, split, source, len(begun["fingerprints"]) if begun else shards or _shards(source),
              skip_broken)
    now = {"samples": len(source), "source": _described(source), "fingerprints": fingerprints(job)}
    if begun is None:
        write_json(plan, now)
    elif shards not in (None, job.shards):
        raise UserError(f"{folder}: split {split!r} has {job.shards} files; expected {shards} as asked for: it can "
                        "only be overwritten")
    else:
        _check_same(folder, split, job, begun, now, "made" if there else "begun")
    return None if there else job


def _check_same(folder: epath.Path, split: str, job: Job, before: Mapping[str, Any], now: Mapping[str, Any],
                how: str) -> None:
    if before["samples"] != now["samples"]:
        change = f"{now['samples']:,} samples now, {before['samples']:,} then"
    else:
        pairs = zip(before["fingerprints"], now["fingerprints"], strict=True)
        other = next((shard for shard, (one, two) in enumerate(pairs) if one != two), None)
        if other is None:
            return
        part = job.samples(other)
        change = f"the first difference is among samples {part.start:,} to {part.stop - 1:,}, from {_name(job, part)}"
    raise UserError(f"{folder}: split {split!r} was {how} of other samples ({before['source']}); found "
                    f"{now['source']}: {change}. Overwrite it (--overwrite), or give another name or data_dir")


def _name(job: Job, part: range) -> str:
    try:
        return job.source[part.start].name or "the first"
    except (UserError, OSError):
        return "the first"


def fingerprints(job: Job) -> list[str]:
    """What each file is made of, as the source tells it; samples in memory are hashed, of others first and last."""
    whole = isinstance(job.source, list | tuple)

    def one(shard: int) -> str:
        samples, digest = job.samples(shard), xxhash.xxh3_128()
        tell = getattr(job.source, "fingerprint", None)
        for index in samples if tell or whole else sorted({samples.start, samples.stop - 1} & {*samples}):
            try:
                parts = [tell(index).encode()] if tell else _content(job.source[index])
            except UserError as error:  # its picture may be mended before the next run
                if not job.skip_broken:
                    raise
                parts = [str(error).encode()]
            for part in parts:
                digest.update(part)
        return digest.hexdigest()

    return [one(shard) for shard in range(job.shards)]


def _content(sample: Sample) -> Iterator[bytes]:
    pictures = [data or b"" for data in (sample.target, sample.image, sample.mask, *sample.references)]
    yield repr((sample.task, sample.prompt, sample.detail, [len(data) for data in pictures])).encode()
    yield from pictures


def _shards(source: Sequence[Sample]) -> int:
    """How many files: by the size of a few samples."""
    sizes = []
    for number in range(LOOKED_AT):
        with contextlib.suppress(UserError, OSError):  # it will be named in its turn
            sample = source[number * len(source) // LOOKED_AT]
            sizes.append(sum(len(data) for data in (sample.target, sample.image, sample.mask, *sample.references)
                             if data is not None))
    total = len(source) * sum(sizes) / max(len(sizes), 1)
    wanted = max(total / SHARD, min(total / LEAST_SHARD, FEW))
    return max(1, min(round(wanted), MANY, len(source)))


def _write(job: Job, workers: int, progress: Progress | None) -> None:
    todo = [shard for shard in range(job.shards) if not _done(job, shard)]
    total, read = len(job.source), 0
    done = total - sum(len(job.samples(shard)) for shard in todo)

    def tell(samples: int, size: int) -> None:
        nonlocal done, read
        done, read = done + samples, read + size
        if progress:
            progress(job.split, done, total, read)

    tell(0, 0)
    write(job, todo, workers, tell)


def _done(job: Job, shard: int) -> bool:
    note = read_json(job.note(shard))
    return note is not None and job.path(shard).exists() and job.path(shard).stat().length == note["bytes"]


def _finish(folder: epath.Path, name: str, version: str, jobs: Mapping[str, Job]) -> None:
    """Metadata of all that is there: the splits of before and those of `jobs`."""
    written, infos = record(folder), _splits(folder)
    for split, job in jobs.items():
        notes: list[Note] = [read_json(job.note(shard)) for shard in range(job.shards)]
        sums = {field: sum(note[field] for note in notes) for field in ("records", "bytes", "pictures")}
        skipped = [message for note in notes for message in note["skipped"]]
        if not sums["records"]:
            raise UserError(f"{folder}: split {split!r}: all {len(skipped)} samples are broken, {skipped[0]}")
        written[split] = read_json(folder / BUILDING / f"{split}.json") | sums | {"skipped": skipped}
        infos[split] = tfds.core.SplitInfo(name=split, shard_lengths=[note["records"] for note in notes],
                                           num_bytes=sums["bytes"])
    write_json(folder / RECORD, written)
    _write_info(folder, name, version, infos)


def _write_info(folder: epath.Path, name: str, version: str, infos: Mapping[str, tfds.core.SplitInfo]) -> None:
    """TFDS's own files, written aside; `dataset_info.json` takes its place last."""
    identity = tfds.core.DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=str(folder),
                                         module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=FEATURES, description="ACE++ samples, written by acejax.")
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(dataset_name=name, data_dir=folder, filetype_suffix="array_record")
    info.set_splits(tfds.core.SplitDict([infos[split].replace(filename_template=template.replace(split=split))
                                         for split in sorted(infos)]))
    aside = folder / BUILDING / "metadata"
    aside.mkdir(parents=True, exist_ok=True)
    info.write_to_directory(aside)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == INFO):
        file.replace(folder / file.name)


def _splits(folder: epath.Path) -> dict[str, tfds.core.SplitInfo]:
    """The splits that are there and done."""
    if not (folder / INFO).exists():
        return {}
    try:
        info = tfds.builder_from_directory(str(folder)).info
    except Exception as error:  # whatever TFDS trips over
        raise UserError(f"{folder}: a TFDS dataset is there that cannot be read ({error})") from error
    if info.features.to_json() != FEATURES.to_json():
        raise UserError(f"{folder}: a TFDS dataset with other features is there; give another name or data_dir")
    return dict(info.splits)


def _remove(folder: epath.Path, name: str, splits: Iterable[str]) -> None:
    """Splits are taken out of the metadata first, so that no reader finds half of them."""
    infos = _splits(folder)
    kept = {split: info for split, info in infos.items() if split not in splits}
    if kept and kept != infos:
        _write_info(folder, name, folder.name, kept)
    elif infos and not kept:
        (folder / INFO).unlink()
    for split in splits:
        for file in [*folder.glob(f"{name}-{split}.array_record-*"), *_of(folder / BUILDING, split)]:
            file.unlink()


def _clear(folder: epath.Path, splits: Iterable[str]) -> None:
    """Nothing is left of finished splits but the dataset."""
    for split in splits:
        for file in _of(folder / BUILDING, split):
            file.unlink(missing_ok=True)


def _of(building: epath.Path, split: str) -> list[epath.Path]:
    return [file for file in building.iterdir() if re.fullmatch(rf"{re.escape(split)}(-\d+)?\.json", file.name)]


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """The folder is made, what was left half-written goes, and no second build works there (on a local disk)."""
    building = folder / BUILDING
    try:
        building.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if fcntl and "://" not in str(folder):
                lock = stack.enter_context((pathlib.Path(building) / "lock").open("a"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{folder}: another build is at work there") from None
                except OSError:  # a file system without locks
                    pass
            for left in (*building.glob("*.part"), *building.glob(".*.tmp")):
                left.unlink(missing_ok=True)
            try:
                yield
            finally:
                if not any(building.glob("*.json")):  # a build of other splits may still have to go on
                    building.rmtree()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _folder(data_dir: epath.PathLike, name: str, version: str, splits: Mapping[str, Any]) -> epath.Path:
    data_dir = epath.Path(data_dir)
    if "://" in str(data_dir) and not str(data_dir).startswith(REMOTE):
        raise UserError(f"data_dir {data_dir}: array_record reads local disks and {', '.join(REMOTE)} only; build into "
                        "a local folder and copy it")
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(f"name {name!r}: expected small letters, digits and _, as TFDS names datasets")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise UserError(f"version {version!r}: expected three numbers, such as 1.0.0")
    for split in splits:
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", split) or split == "all":
            raise UserError(f"split {split!r}: expected letters, digits and _, such as train, and not 'all'")
    return data_dir / name / version


def _described(source: Sequence[Sample]) -> str:
    return str(getattr(source, "path", None) or f"{type(source).__name__} of {len(source):,} samples")
