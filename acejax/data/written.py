"""Files that are there whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator

from etils import epath

from acejax.errors import UserError

PART = ".part"  # ends the name of a file that is being written


@contextlib.contextmanager
def beside(path: epath.PathLike) -> Iterator[epath.Path]:
    """A path to write, which no other writer has; renamed at the end, over a file that is there.

    Raises:
      UserError: it cannot be written; nothing is left behind.
    """
    path = epath.Path(path)
    place = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}"
    try:
        yield place
        place.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error}") from error
        raise


def check_place(path: epath.PathLike | None, flag: str = "--json") -> None:
    """Raises UserError where no file can be: told before the work whose result it is for. None is no file.

    A bucket's folders come with their files.
    """
    if path and "://" not in str(path) and not epath.Path(path).parent.exists():
        raise UserError(f"{flag}={path}: its folder is not there")
    if path and epath.Path(path).is_dir():
        raise UserError(f"{flag}={path} is a folder; expected a file to write")


def check_folder(path: epath.PathLike) -> None:
    """Raises UserError where a file, and the folders above it that are not there, cannot be made; told before the work.
    """
    there = next((folder for folder in epath.Path(path).absolute().parents if folder.exists()), None)
    if "://" not in str(path) and there and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"{path} cannot be written: {there} is " + ("read-only" if there.is_dir() else "no folder"))


def write(path: epath.PathLike, data: bytes) -> None:
    """Write a file; raises as `beside`."""
    with beside(path) as place:
        place.write_bytes(data)
