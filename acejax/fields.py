"""A config's fields as frozen dataclasses: each checked for its name and type, and named where it is wrong."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from acejax.errors import UserError

T = TypeVar("T")


def part(config: Mapping[str, Any], name: str, before: str = "") -> Mapping[str, Any]:
    """The fields that a config has under `name`; `before` is where the config itself stands, for messages.

    Raises:
      UserError: it is missing, or no fields.
    """
    if name not in config or not hasattr(config[name], "keys"):
        raise UserError(f"config.{before}{name} is {'missing' if name not in config else repr(config[name])}; "
                        "expected fields")
    return config[name]


def read(cls: type[T], config: Mapping[str, Any], name: str, before: str = "") -> T:
    """A dataclass from the fields that a config has under `name`.

    Raises:
      UserError: a field that is missing, unknown or of another type, or what the class itself refuses.
    """
    given, where = part(config, name, before), f"config.{before}{name}"
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - set(fields)):
        raise UserError(f"{where}.{unknown[0]}: no such field; expected {', '.join(fields)}")
    values = {}
    for field in fields.values():
        if field.name in given:
            values[field.name] = value(given[field.name], field.type, f"{where}.{field.name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{field.name} is missing")
    try:
        return cls(**values)
    except (UserError, ValueError) as error:
        raise UserError(f"config.{before}{error}" if str(error).startswith(name) else f"{where}: {error}") from None


def value(value: Any, wanted: Any, where: str) -> Any:
    """A field's value, lists as tuples, if it is of the type `wanted`.

    Raises:
      UserError: it is of another one.
    """
    value = _plain(value)
    if not _fits(value, wanted):
        name = str(wanted).replace("collections.abc.", "") if get_args(wanted) else wanted.__name__
        raise UserError(f"{where} is {value!r}; expected {'a number' if wanted is float else name}")
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):  # a ConfigDict is no Mapping
        return {name: _plain(one) for name, one in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, wanted: Any) -> bool:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (types.UnionType, Union):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        parts = parts[:1] * len(value) if parts[-1] is ... and isinstance(value, tuple) else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(one, part) for pair in value.items()
                                                  for one, part in zip(pair, parts, strict=True))
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return wanted is Any or isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
