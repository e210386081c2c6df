"""Edits are checked, made and written, one after another or several at once."""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from acejax.cli.edit_weights import Opened
from acejax.data import written
from acejax.data.progress import Progress
from acejax.edit import files, record
from acejax.edit.editor import Checked, Say, groups
from acejax.edit.manifest import Entry
from acejax.edit.record import File, Record
from acejax.edit.request import Options, Result
from acejax.errors import UserError
from acejax.parallel import memory

AHEAD = 64  # prompts that are read together where weights take turns: as many as `acejax.edit.models` remembers
REMEDY = ("--batch=1 and fewer references need less; with --base so do --staged, --offload, --eight_bits=int8 and "
          "--tile=64")


def check(entries: Sequence[Entry], opened: Opened, options: Options) -> list[Checked]:
    """Look at all edits before any is made.

    Raises:
      UserError: one that can't be; in a manifest its line is named, and how many there are.
    """
    found, faults = [], []
    with Progress(len(entries), "checking", "edits") as progress:
        for entry in entries:
            try:
                found.append(opened.editor.check(entry.open()[0], options))
                files.check_size(entry.out, found[-1].size)
            except UserError as error:
                faults.append(f"{entry.line}: {error}" if entry.line else str(error))
            progress.update()
    if faults:
        raise UserError(faults[0] + (f" ({len(faults)} edits have faults)" if len(faults) > 1 else ""))
    return found


@memory.told(lambda: REMEDY)
def run(entries: Sequence[Entry], checked: Sequence[Checked], opened: Opened, options: Options,
        batch: int) -> list[dict[str, Any]]:
    """Make and write the edits. Staged, the text encoders and the transformer take turns for 64 prompts at once.

    Args:
      checked: of `check`.
      batch: most edits at once.

    Returns:
      What is told of each, in their order.

    Raises:
      UserError: a place that can't be written to, before any edit is made; memory that the devices do not have.
    """
    for entry in entries:
        written.check_folder(entry.out)
    rows: dict[int, dict[str, Any]] = {}
    order, read = groups([one.kind for one in checked], batch), set()
    with Progress(len(entries), "edit", "edits") as progress:
        for place, members in enumerate(order):
            start, chosen = time.time(), [entries[index] for index in members]
            if opened.flags["staged"] and any(checked[index].prompt not in read for index in members):
                left = dict.fromkeys(checked[index].prompt for later in order[place:] for index in later)
                read = [*left][:AHEAD]
                opened.editor.read(read)
            made = edit(chosen, opened, options, tell(progress))
            for index, entry, (result, about) in zip(members, chosen, made, strict=True):
                epath.Path(entry.out).parent.mkdir(parents=True, exist_ok=True)
                files.write_picture(entry.out, result.picture, {record.KEY: about.text()}, files.colors(entry.image))
                rows[index] = row(entry, result, about, (time.time() - start) / len(members))
                _wrote(rows[index], f"{len(rows)} of {len(entries)}: " if len(entries) > 1 else "")
                progress.update()
    return [rows[index] for index in range(len(entries))]


@memory.told(lambda: REMEDY)
def warm_up(entries: Sequence[Entry], checked: Sequence[Checked], opened: Opened, options: Options, batch: int) -> int:
    """Make edits of each shape and number and write nothing: their programs are in the compile cache then, and counted.
    """
    order = groups([one.kind for one in checked], batch)
    distinct = {(checked[members[0]].shape, len(members)): members for members in order}
    with Progress(len(distinct), "warm-up", "kinds of edits") as progress:
        for members in distinct.values():
            opened.editor.edit([entries[index].open()[0] for index in members], options, tell(progress))
            progress.update()
    return len(distinct)


@memory.told(lambda: REMEDY)
def edit(entries: Sequence[Entry], opened: Opened, options: Options, say: Say | None = None
         ) -> list[tuple[Result, Record]]:
    """Edits of one kind, made at once, and the record of each."""
    read, weights = [entry.open() for entry in entries], opened.files
    results = opened.editor.edit([request for request, _ in read], options, say)
    made = []
    for place, (entry, (request, hashes), result) in enumerate(zip(entries, read, results, strict=True)):
        folder = epath.Path(entry.out).parent

        def seen(value: Any, folder: epath.Path = folder) -> Any:
            return record.relative(folder, value) if isinstance(value, str) and value.startswith("/") else value

        used = [File(name, record.relative(folder, path), sha256)
                for (name, path), sha256 in zip(entry.inputs, hashes, strict=True)]
        used += [dataclasses.replace(file, path=seen(file.path)) for file in weights]
        flags = {name: seen(value) for name, value in opened.flags.items()}
        made.append((result, record.make(opened.editor.profile, request, options, result, (place, len(entries)), flags,
                                         used)))
    return made


def row(entry: Entry, result: Result, about: Record, seconds: float) -> dict[str, Any]:
    """What is told of an edit."""
    names = ("task", "prompt", "told", "seed", "steps", "guidance", "step_cache", "scale", "size", "grow", "crop",
             "paste", "parity", "batch")
    return {"out": entry.out, **({"line": entry.line} if entry.line else {}),
            **{name: getattr(about, name) for name in names},
            "window": None if result.window is None else dataclasses.asdict(result.window), "drift": result.drift,
            "tokens": result.tokens, "notes": list(result.notes), "skipped": result.skipped,
            "cache_error": result.cache_error, "seconds": round(seconds, 3)}


def tell(progress: Progress) -> Say:
    """Of an edit, the step that it is at; how much of it is done the bar of all edits can't show."""
    return lambda what, share: progress.say(what)


def _wrote(row: Mapping[str, Any], place: str) -> None:
    """A line of a result, and what a user should know of it."""
    told = f"task {row['task']}, {row['size'][0]} x {row['size'][1]} pixels, seed {row['seed']}, {row['seconds']:.1f} s"
    if row["drift"] is not None:
        told += f", {row['drift']:.2f} of 255 off outside the mask before pasting"
    if row["step_cache"] is not None:
        told += f", {row['skipped']} of {row['steps']} steps without the blocks"
    if row["cache_error"] is not None:
        told += f", {row['cache_error']:.2f} of 255 off whole steps"
    tqdm.write(f"{place}wrote {row['out']} ({told})", file=sys.stdout)
    for note in row["notes"]:
        tqdm.write(f"{row['out']}: {note}", file=sys.stderr)
