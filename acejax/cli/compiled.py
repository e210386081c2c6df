"""Where compiled programs are kept, so that the second start of a command compiles nothing. Set here and nowhere else.

jax keeps each program as a file, by everything that it depends on: the program itself, the devices, compiler options,
the versions of jax and of the compiler. Only commands ask for it; `import acejax` leaves jax's settings as they are.
"""

import os
import pathlib
import sys
from typing import Any

from acejax.errors import UserError

FOLDER = "JAX_COMPILATION_CACHE_DIR"  # jax's own variable; empty for none
# By default jax leaves out what compiles within a second, on GPUs and TPUs too: of a start these are most programs.
THRESHOLDS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0, "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": 0}


def keep(folder: str | None = None) -> None:
    """Keep programs in a folder, which may be on gs://; call it before the first one is compiled.

    Args:
      folder: "" for none. None is what the environment says (`FOLDER`), else the user's cache folder, where that can be
        written.

    Raises:
      UserError: the folder can't be made.
    """
    if folder is None:
        folder = os.environ.get(FOLDER)
    elif folder and "://" not in folder:
        try:
            pathlib.Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--compile_cache={folder}: {error.strerror}; expected a folder, or nothing for none"
                            ) from None
        folder = str(pathlib.Path(folder).expanduser().absolute())
    _set(FOLDER, _default() if folder is None else folder)
    for name, value in THRESHOLDS.items():
        if name not in os.environ:
            _set(name, value)


def _default() -> str:
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"), "acejax", "compiled")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""  # jax would complain once a program
    return str(folder)


def _set(name: str, value: Any) -> None:
    """In the environment, which jax reads when it is imported, as do processes that are started from this one."""
    os.environ[name] = str(value)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(name.lower(), value)
