"""Flags and configs on the command line, as JAX users expect: `--config=FILE.py:arg --config.a.b=value` (absl)."""

import re
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from acejax.errors import UserError

CPU_DEVICES = 2
QUOTES = "[\"']"
Define = Callable[[flags.FlagValues], None]


def folder() -> epath.Path:
    """Where the configs that come with acejax are: `acejax/configs` when installed, `configs/` of a checkout."""
    package = epath.Path(__file__).parent.parent
    return next(path for path in (package / "configs", package.parent / "configs") if path.exists())


def parse_flags(command: str, argv: Sequence[str], define: Define) -> flags.FlagValues | None:
    """Parse a command's flags, added by `define`; None when help was asked for and printed.

    Raises:
      UserError: an unknown flag or config field, a wrong value, or an argument that is no flag.
    """
    values = flags.FlagValues()
    define(values)
    if any(flag in argv for flag in ("-h", "--help")):
        print(f"usage: acejax {command} [flags]\n{values.get_help()}")
        return None
    try:
        rest = values([command, *argv])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        unknown = isinstance(error, (KeyError, AttributeError))
        text = "no such config field: " + re.sub(QUOTES, "", str(error.args[0])) if unknown else str(error).strip()
        lines = (text or type(error).__name__).splitlines()
        why = f" {lines[-1]}" if lines[0].endswith("parsing config file:") else ""  # the last line of a traceback
        raise UserError(f"{command}: {lines[0]}{why}") from error
    if rest:
        hint = f"; write --config.{rest[0]}" if re.fullmatch(r"[\w.]+=.*", rest[0]) else ""
        raise UserError(f"{command}: {rest[0]!r} is no flag{hint}")
    return values


def parse_config(command: str, argv: Sequence[str], define: Define,
                 default: str | None = None) -> tuple[flags.FlagValues, ml_collections.ConfigDict] | None:
    """`parse_flags` for a command that takes `--config`; a file that is not found is looked for in `folder()`.

    Raises:
      UserError: as `parse_flags`; no config, or one that is nowhere.
    """
    argv = [_find(arg) for arg in argv]
    path = default and str(folder() / default)

    def define_all(values: flags.FlagValues) -> None:
        config_flags.DEFINE_config_file("config", path, "The run's config file.", flag_values=values,
                                        sys_argv=[command, *argv])
        define(values)

    values = parse_flags(command, argv, define_all)
    if values is None:
        return None
    config = values["config"].value
    if config is None:
        raise UserError(f"{command}: --config=FILE.py is missing; {_known()}")
    return values, config


def _find(arg: str) -> str:
    match = re.fullmatch(r"(--?config=)([^:]+\.py)(:.*)?", arg)
    if match is None or epath.Path(match[2]).exists():
        return arg
    path = folder() / epath.Path(match[2]).name
    if not path.exists():
        raise UserError(f"config file {match[2]} is not there; {_known()}")
    return f"{match[1]}{path}{match[3] or ''}"


def _known() -> str:
    return f"configs that come with acejax: {', '.join(sorted(path.name for path in folder().glob('*.py')))}"
