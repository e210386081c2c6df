"""Files that are there whole or not at all."""

import contextlib

from etils import epath

from acejax.errors import UserError


def write(path: epath.PathLike, data: bytes) -> None:
    """Write a file beside and rename it, over one that is there.

    Raises:
      UserError: it cannot be written; nothing is left behind.
    """
    path = epath.Path(path)
    beside = path.parent / f".{path.name}.tmp"
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}") from error
