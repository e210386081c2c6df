"""Configs on the command line, as JAX users expect: `--config=FILE.py:arg --config.a.b=value` (absl, config_flags)."""

import importlib.util
import os
import re
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from acejax.errors import UserError


def folder() -> epath.Path:
    """Where the configs that come with acejax are: `configs/` of a checkout, `acejax/configs` when installed."""
    package = epath.Path(__file__).parent.parent
    return next(path for path in (package / "configs", package.parent / "configs") if path.exists())


def parse(command: str, argv: Sequence[str], define: Callable[[flags.FlagValues], None],
          default: str | None = None) -> flags.FlagValues | None:
    """Parse a command's flags, `--config` among them; None when help was asked for and printed.

    `define` adds the command's own flags. A config that is not found as given is looked for by its name in `folder()`.

    Raises:
      UserError: an unknown flag or field, a wrong value, or an argument that is no flag.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", default and str(folder() / default), "The run's config file.",
                                    flag_values=values)
    define(values)
    if any(flag in argv for flag in ("-h", "--help")):
        print(f"usage: acejax {command} [flags]\n{values.main_module_help() or values.get_help()}")
        return None
    argv = [_shipped(arg) for arg in argv]
    try:
        rest = values([command, *argv])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(f"{command}: {_first_line(error)}") from error
    if rest:
        hint = f"; write --config.{rest[0]}" if re.fullmatch(r"[\w.]+=.*", rest[0]) else ""
        raise UserError(f"{command}: {rest[0]!r} is no flag{hint}")
    if values["config"].value is None:
        raise UserError(f"{command}: --config=FILE.py is missing; configs that come with acejax: "
                        f"{', '.join(sorted(path.name for path in folder().glob('*.py')))}")
    return values


def config_of(values: flags.FlagValues) -> ml_collections.ConfigDict:
    """The parsed config."""
    return values["config"].value


def _shipped(arg: str) -> str:
    match = re.fullmatch(r"(--?config=)([^:]+\.py)(:.*)?", arg)
    if match and not os.path.exists(match[2]):
        path = folder() / epath.Path(match[2]).name
        if not path.exists():
            raise UserError(f"config file {match[2]} is not there; configs that come with acejax: "
                            f"{', '.join(sorted(path.name for path in folder().glob('*.py')))}")
        return f"{match[1]}{path}{match[3] or ''}"
    return arg


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
