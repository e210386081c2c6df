"""Edits by their files: one, or a manifest of them as JSONL, an object on each line with the fields of `Entry`."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from acejax import fields
from acejax.edit import files
from acejax.edit.request import MOST_SEED, Request
from acejax.errors import UserError

PICTURES = ("image", "mask", "references", "control")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One edit.

    Attributes:
      out: the file to write. In a manifest below the folder of the results; LINE.png where it is left out.
      prompt, task, scale, seed: as in `Request`.
      image, mask, references, control: files; in a manifest relative ones start at its folder.
      size: "WIDTHxHEIGHT".
      line: where it stands, for messages: "edits.jsonl:3", or "".
    """

    out: str
    prompt: str = ""
    task: str | None = None
    image: str | None = None
    mask: str | None = None
    references: tuple[str, ...] = ()
    control: str | None = None
    size: str | None = None
    scale: float | None = None
    seed: int = 0
    line: str = ""

    def __post_init__(self):
        if not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"seed is {self.seed}; expected 0 to {MOST_SEED}")
        for name in ("mask", "control"):
            if getattr(self, name) and not self.image:
                raise UserError(f"--{name} without --image" if not self.line else f"{name} without image")
        if inputs := [path for _, path in self.inputs if place(path) == place(self.out)]:
            raise UserError(f"{inputs[0]} is a picture to read; expected another file to write")
        _pixels(self.size)
        files.picture_format(self.out, made=bool(self.line))

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """(field, path) of each file."""
        named = [(name, getattr(self, name)) for name in PICTURES if name != "references"]
        return tuple((name, path) for name, path in named if path) + tuple(("references", path)
                                                                           for path in self.references)

    def open(self) -> tuple[Request, tuple[str, ...]]:
        """The request with its pictures read, and the SHA-256 of each of `inputs`.

        Raises:
          UserError: a file that can't be read, or a mask that does not fit its picture.
        """
        image, hashes = None, []
        arrays: dict[str, list] = {name: [] for name in PICTURES}
        for name, path in self.inputs:
            if name == "mask":
                array, sha256 = files.hashed_mask(path, image.shape[:2])
            else:
                array, sha256 = files.hashed_picture(path)
            image = array if name == "image" else image
            arrays[name].append(array)
            hashes.append(sha256)
        references = tuple(arrays.pop("references"))
        one = {name: found[0] if found else None for name, found in arrays.items()}
        return Request(self.prompt, self.task, references=references, size=_pixels(self.size), scale=self.scale,
                       seed=self.seed, **one), tuple(hashes)


def place(path: str) -> str:
    """Where a path leads in the end, to tell whether two are one file."""
    return path if "://" in path else os.path.realpath(path)


def seeded(entry: Entry, seeds: Sequence[int]) -> list[Entry]:
    """An edit with each of several seeds; the files are named by them: out-7.png."""
    if len(seeds) == 1:
        return [dataclasses.replace(entry, seed=seeds[0])]
    stem, dot, suffix = entry.out.rpartition(".")
    return [dataclasses.replace(entry, seed=seed, out=f"{stem}-{seed}{dot}{suffix}") for seed in dict.fromkeys(seeds)]


def read(path: epath.PathLike, out: epath.PathLike, defaults: Mapping[str, Any], seeds: Sequence[int]) -> list[Entry]:
    """The edits of a manifest.

    Args:
      path: a file of JSON lines; empty ones and those that start with # are passed over.
      out: the folder of the results.
      defaults: fields for lines that do not have them.
      seeds: for lines without a seed.

    Raises:
      UserError: no such file, or a line with a fault: the first is named, and how many there are.
    """
    path, out = epath.Path(path), epath.Path(out)
    try:
        lines = path.read_text(encoding="utf-8").removeprefix("\ufeff").split("\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"manifest {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"manifest {path} cannot be read: {error}") from error
    if not out.parent.exists() or out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: expected a folder" + ("" if out.parent.exists() else f"; {out.parent} is not "
                                                             "there"))
    entries: list[Entry] = []
    faults, taken = [], {}
    for number, text in enumerate(lines, 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        line = f"{path.name}:{number}"
        try:
            found = _entries(text, line, path.parent, out, defaults, seeds)
            for entry in found:
                if (other := taken.setdefault(entry.out, line)) != line:
                    raise UserError(f"out is {entry.out}, as in {other}")
            entries += found
        except UserError as error:
            faults.append(f"{line}: {error}")
    read = {place(name): entry.line for entry in entries for _, name in entry.inputs}
    made = {entry.out: entry.line for entry in entries}
    for entry in entries:
        if folder := next((path for path in map(str, epath.Path(entry.out).parents) if path in made), None):
            faults.append(f"{entry.line}: out is {entry.out}, below the file {folder} of {made[folder]}")
        if (other := read.get(place(entry.out))) is not None:
            faults.append(f"{entry.line}: out is {entry.out}, a picture that {other} reads")
    if faults:
        raise UserError(faults[0] + (f" ({len(faults)} lines have faults)" if len(faults) > 1 else ""))
    if not entries:
        raise UserError(f"manifest {path}: found no edit")
    return entries


def _entries(text: str, line: str, folder: epath.Path, out: epath.Path, defaults: Mapping[str, Any],
             seeds: Sequence[int]) -> list[Entry]:
    known = {field.name: field.type for field in dataclasses.fields(Entry) if field.name != "line"}
    given = dict(defaults) | _object(text)
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{name[:60]!r} is no field; the fields are {', '.join(known)}")
        given[name] = fields.value(value, known[name], name)
    name = given.get("out", f"{int(line.rpartition(':')[2]):05d}.png")
    if name.startswith("/") or "://" in name or ".." in name.split("/"):
        raise UserError(f"out is {name!r}; expected a file below the folder of the results")
    given["out"] = str(out / name)
    for name in PICTURES:
        if name == "references":
            given[name] = tuple(_below(folder, path) for path in given.get(name, ()))
        elif given.get(name) is not None:
            given[name] = _below(folder, given[name])
    entry = Entry(**given, line=line)
    return [entry] if "seed" in given else seeded(entry, seeds)


def _object(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field is there twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"found no good JSON ({' '.join(str(error).split())[:100]}); expected an object, like "
                        '{"image": ..., "mask": ..., "prompt": ...}') from error
    if not isinstance(found, dict):
        raise UserError('expected an object, like {"image": ..., "mask": ..., "prompt": ...}')
    return found


def _below(folder: epath.Path, path: str) -> str:
    return path if path.startswith("/") or "://" in path else str(folder / path)


def _pixels(size: str | None) -> tuple[int, int] | None:
    """"WIDTHxHEIGHT" as height and width."""
    if size is None:
        return None
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)):
        raise UserError(f"size is {size!r}; expected WIDTHxHEIGHT, such as 1024x768")
    return int(match[2]), int(match[1])
