"""The data part of a run's config (`configs/ace_plus.py`), checked field by field."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_origin

from etils import epath

from acejax.data.augment import AugmentConfig
from acejax.data.cache.build import CacheConfig, settings
from acejax.data.cache.features import Settings
from acejax.data.encoders import Encoders, EncodersConfig
from acejax.data.layout import CanvasConfig
from acejax.data.sample import Sample
from acejax.data.sources import open_source
from acejax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Arguments of `acejax.data.sources.open_source`."""

    path: str
    split: str = "train"
    fields: Any = None
    prefix: str | None = None

    def open(self) -> Sequence[Sample]:
        return open_source(self.path, self.split, self.fields, self.prefix)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads, and what becomes of it.

    Attributes:
      sources: by name.
      canvas, augment, encoders, cache: as the classes say; encoders are None where others are given.
      seed: of the run.
      max_broken: share of broken samples that stops it.
    """

    sources: Mapping[str, SourceConfig]
    canvas: CanvasConfig
    augment: AugmentConfig
    encoders: EncodersConfig | None
    cache: CacheConfig
    seed: int
    max_broken: float = 0.01

    @classmethod
    def of(cls, config: Mapping[str, Any], cache_dir: str | None = None) -> "DataConfig":
        """Read `data`, `encoders`, `cache` and `seed` of a run's config; `cache_dir` stands in for `cache.dir`.

        Raises:
          UserError: a field that is missing, unknown, of another type, or out of range.
        """
        data = _part(config, "data")
        given = _part(data, "sources", "data.")
        if not given:
            raise UserError("config.data.sources is empty; expected {name: {'path': ..., 'split': 'train'}}")
        sources = {name: _read(SourceConfig, given, name, "data.sources.") for name in given}
        stored = dict(_part(config, "cache")) | ({} if cache_dir is None else {"dir": cache_dir})
        max_broken = data.get("max_broken", 0.01)
        if not isinstance(max_broken, int | float) or not 0 <= max_broken <= 1:
            raise UserError(f"config.data.max_broken is {max_broken!r}; expected a share, 0 to 1")
        return cls(sources, _read(CanvasConfig, data, "canvas", "data."),
                   _read(AugmentConfig, data, "augment", "data."), _read(EncodersConfig, config, "encoders"),
                   _read(CacheConfig, {"cache": stored}, "cache"), config.get("seed", 0), max_broken)

    def load_encoders(self) -> Encoders:
        """The encoders, of which nothing is read yet but names; weights are hashed once for each cache."""
        return Encoders.load(self.encoders, notes=epath.Path(self.cache.dir) / "weights.json")

    def settings(self, encoders: Encoders) -> dict[str, Settings]:
        """Of each source, by name: what its features are found by."""
        return {name: settings(name, dataclasses.asdict(source), self.canvas, self.augment, encoders, self.cache,
                                     self.seed) for name, source in self.sources.items()}


def _part(config: Mapping[str, Any], name: str, before: str = "") -> Mapping[str, Any]:
    if name not in config or not hasattr(config[name], "keys"):
        raise UserError(f"config.{before}{name} is {'missing' if name not in config else repr(config[name])}; "
                        "expected fields")
    return config[name]


def _read(cls: type[T], config: Mapping[str, Any], name: str, before: str = "") -> T:
    """A dataclass from the fields that a config has under `name`."""
    given, where = _part(config, name, before), f"config.{before}{name}"
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - set(fields)):
        raise UserError(f"{where}.{unknown[0]}: no such field; expected {', '.join(fields)}")
    values = {}
    for field in fields.values():
        if field.name in given:
            values[field.name] = _value(given[field.name], field.type, f"{where}.{field.name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{field.name} is missing")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"config.{before}{error}" if str(error).startswith(name) else f"{where}: {error}") from None


def _value(value: Any, wanted: Any, where: str) -> Any:
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, list):
        value = tuple(value)
    plain = wanted if isinstance(wanted, type) or get_origin(wanted) in (types.UnionType, Union) else None
    plain = plain and (int | float if wanted is float else wanted)
    if plain and (not isinstance(value, plain) or isinstance(value, bool) and wanted is not bool):
        expected = "a number" if wanted is float else getattr(wanted, "__name__", str(wanted))
        raise UserError(f"{where} is {value!r}; expected {expected}")
    return value
