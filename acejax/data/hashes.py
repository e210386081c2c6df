"""Hashes of large files, kept with their size and time of change, so that no file is read twice for its own."""

import contextlib
import json
import pathlib

import xxhash
from etils import epath

from acejax.data import written
from acejax.errors import UserError

BLOCK = 2**24  # bytes hashed at once


class Hashes:
    """xxh3_128 of files; those in the notes are taken where the file is of the same size and time.

    Args:
      notes: a file to keep them in, by path; None keeps none.
    """

    def __init__(self, notes: epath.PathLike | None):
        self._path = None if notes is None else epath.Path(notes)
        self._known: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError):
            known = None if self._path is None else json.loads(self._path.read_text())
            self._known = known if isinstance(known, dict) else {}
        self._before = dict(self._known)

    def of(self, path: pathlib.Path) -> str:
        """Of one file."""
        about = path.stat()
        mark = [about.st_size, about.st_mtime_ns]
        known = self._known.get(str(path.resolve()))
        if not (isinstance(known, list) and known[:-1] == mark):
            digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(block):
                    digest.update(block[:count])
            known = self._known[str(path.resolve())] = [*mark, digest.hexdigest()]
        return known[-1]

    def keep(self) -> None:
        """Write the notes, where they can be: without them files are read again."""
        if self._path is not None and self._known != self._before:
            with contextlib.suppress(OSError, UserError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                written.write(self._path, json.dumps(self._known, indent=1).encode())
