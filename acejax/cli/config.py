"""Flags and configs on the command line, as JAX users expect: `--config=FILE.py:arg --config.a.b=value` (absl)."""

import os
import re
from collections.abc import Callable, Iterator, Sequence

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from acejax.cli import compiled
from acejax.errors import UserError

CPU_DEVICES = 2
HOME = re.compile(r"^(?!--?prompt=)(--?[\w.-]+=)~(?=/|$)")  # which no shell expands there
QUOTES = "[\"']"
PARSING = "Error whilst parsing config file:"
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
    flags.DEFINE_string("compile_cache", None, "A folder that keeps compiled programs, so that the next start compiles "
                        "nothing; empty: none. By default JAX_COMPILATION_CACHE_DIR, else ~/.cache/acejax/compiled.",
                        flag_values=values)
    argv = _at_home(argv)
    if any(flag in argv for flag in ("-h", "--help")):
        print(f"usage: acejax {command} [flags]\n{values.get_help()}")
        return None
    try:
        rest = values([command, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        value = f"={error.flagvalue.partition('=')[2]}" if "=" in (error.flagvalue or "") else "=..."
        raise UserError(f"{command}: {error}{_meant(error.flagname, value, values)}") from error
    except (AttributeError, IndexError, KeyError) as error:
        name, *suggestion = re.sub(QUOTES, "", str(error.args[0]).encode().decode("unicode_escape")).split("\n")
        hint = suggestion[0].partition(" instead")[0].replace("Did", "; did") + "?" if suggestion else ""
        raise UserError(f"{command}: no such config field: {_path(name.strip(), argv)}{hint}") from error
    except (flags.Error, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        if lines[0].endswith(PARSING):  # the last line of a traceback tells why
            why = lines[-1].removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
            lines[0] = lines[0].removesuffix(PARSING) + why
        raise UserError(f"{command}: {lines[0]}") from error
    if values["compile_cache"].present:
        compiled.keep(values["compile_cache"].value)
    if rest:
        name, equals, value = rest[0].partition("=")
        hint = f"; write --config={rest[0]}" if name.endswith(".py") else _meant(name, equals + value, values)
        raise UserError(f"{command}: {rest[0]!r} is no flag{hint}")
    return values


def parse_config(command: str, argv: Sequence[str], define: Define,
                 default: str | None = None) -> tuple[flags.FlagValues, ml_collections.ConfigDict] | None:
    """`parse_flags` for a command that takes `--config`; a file that is not found is looked for in `folder()`.

    Raises:
      UserError: as `parse_flags`; no config, or one that is nowhere.
    """
    argv = [_find(arg) for arg in _at_home(argv)]
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


def _path(name: str, argv: Sequence[str]) -> str:
    """The whole path of a field that a config lacks, as the command line has it."""
    found = (re.match(rf"--?config\.((?:[^=]*\.)?{re.escape(name)})(?![\w-])", arg) for arg in argv)
    return next((match[1] for match in found if match), name)


def _meant(name: str, value: str, values: flags.FlagValues) -> str:
    """A hint for what is no flag: the config's fields of that name, one that is the very path before all others."""
    config = values["config"].value if "config" in values else None
    name = name.removeprefix("config.")
    paths = [] if config is None else [path for path in _paths(config) if f".{path}".endswith(f".{name}")]
    paths = [name] if name in paths else paths
    return f"; write {' or '.join(f'--config.{path}{value}' for path in paths)}" if paths else ""


def _paths(fields: ml_collections.ConfigDict, before: str = "") -> Iterator[str]:
    for name, value in fields.items():
        yield f"{before}{name}"
        if isinstance(value, ml_collections.ConfigDict):
            yield from _paths(value, f"{before}{name}.")


def _at_home(argv: Sequence[str]) -> list[str]:
    return [HOME.sub(lambda found: found[1] + os.path.expanduser("~"), arg) for arg in argv]


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
