"""A compiled step as a file: a line, a header as JSON that says what the program is for, and jax's own bytes of it.

    acejax executable 1\\n | length of the header, 8 bytes, little-endian | header | payload

The header is read without running anything. The payload is a program, and jax keeps the way to call it as a pickle:
**loading one runs what it holds**, as starting any program does. acejax loads those alone that a user names
(`--executables`); weights, LoRAs and data never are such files.
"""

import dataclasses
import hashlib
import json
from typing import Any

from etils import epath

from acejax.data import written
from acejax.errors import UserError

MAGIC = b"acejax executable 1\n"
SUFFIX = ".executable"  # of files that a folder is searched for
LENGTH = 8  # bytes that tell the header's length
LONGEST = 2**26  # bytes of a header: more is damage


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of its program.

    Attributes:
      key: all that the program depends on (`acejax.train.executables.key`).
      metrics: names of the step's metrics.
      size, sha256: of the payload.
    """

    key: dict[str, Any]
    metrics: tuple[str, ...]
    size: int
    sha256: str


def write(path: epath.PathLike, key: dict[str, Any], metrics: tuple[str, ...], payload: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
      UserError: it can't be written.
    """
    header = Header(key, metrics, len(payload), hashlib.sha256(payload).hexdigest())
    text = json.dumps(dataclasses.asdict(header)).encode()
    written.write(path, MAGIC + len(text).to_bytes(LENGTH, "little") + text + payload)


def read(path: epath.PathLike) -> Header:
    """The header of a file.

    Raises:
      UserError: the file can't be read, is none of these, or is damaged.
    """
    return _read(path, whole=False)[0]


def payload(path: epath.PathLike) -> bytes:
    """The program of a file, as jax has written it. Raises as `read`, also where it is not what the header says."""
    header, found = _read(path, whole=True)
    if len(found) != header.size:
        raise _damaged(path, f"found {len(found):,} bytes of a program, expected {header.size:,}")
    if (sha256 := hashlib.sha256(found).hexdigest()) != header.sha256:
        raise _damaged(path, f"found a program of sha256 {sha256[:16]}, expected {header.sha256[:16]}")
    return found


def _read(path: epath.PathLike, whole: bool) -> tuple[Header, bytes]:
    try:
        with epath.Path(path).open("rb") as file:
            if (magic := file.read(len(MAGIC))) != MAGIC:
                raise UserError(f"{path} is no saved executable: it begins with {magic!r}, expected {MAGIC!r}")
            length = int.from_bytes(file.read(LENGTH), "little")
            text = file.read(length) if length <= LONGEST else b""
            rest = file.read() if whole else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(text) != length:
        raise _damaged(path, f"found {len(text):,} bytes of a header, expected {length:,}")
    try:
        found = json.loads(text)
        return Header(dict(found["key"]), tuple(found["metrics"]), int(found["size"]), str(found["sha256"])), rest
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"found a header that is none ({type(error).__name__}: {error}), expected JSON with key, "
                             "metrics, size and sha256") from error


def _damaged(path: epath.PathLike, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; delete it, the next start makes it again")
