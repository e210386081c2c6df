"""What a result was made of, kept in its PNG, so that the edit can be verified and made again to the pixel."""

import dataclasses
import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

import acejax
from acejax import fields
from acejax.data import pictures
from acejax.edit import files
from acejax.edit.manifest import PICTURES, Entry
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Request, Result
from acejax.errors import UserError

KEY = "acejax"  # of the PNG's iTXt chunk, whose text is one JSON object
FORM = 1
MOST_BATCH = 64
CONTROLS = ("Cc", "Zl", "Zp")  # of Unicode: what a terminal might obey; other letters that names have are shown


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was read. `path` starts at the result's folder; `checksum` is SHA-256 of pictures, xxh3_128 of
    weights; `scale` is a LoRA's strength.
    """

    field: str
    path: str
    checksum: str
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """What a result was made of.

    Attributes:
      acejax, jax: versions.
      platform: jax's, with the kind of device: "cpu", "gpu NVIDIA H100".
      task, prompt, told: the preset, the user's words, what the model was told.
      seed, steps, guidance, scale: as they were used.
      size, crop, paste, parity, grow, step_cache: of the result (width, height), and how.
      asked: the size that was asked for (width, height), if any was.
      batch: its place among edits of equal shape that were made at once, and their number. Other batches may round
        otherwise.
      opened: the flags that name the weights; paths start at the result's folder.
      files: pictures ("image", "mask", "references", "control"), "weights" and "lora".
    """

    acejax: str
    jax: str
    platform: str
    task: str
    prompt: str
    told: str
    seed: int
    steps: int
    guidance: float | None
    scale: float
    size: tuple[int, int]
    crop: str
    paste: str
    parity: str | None
    batch: tuple[int, int]
    opened: Mapping[str, bool | str | None]
    files: tuple[File, ...]
    asked: tuple[int, int] | None
    grow: int = 0
    step_cache: float | None = None

    def __post_init__(self):
        if not 0 <= self.batch[0] < self.batch[1] <= MOST_BATCH:
            raise UserError(f"batch is {self.batch}; expected a place and a number of at most {MOST_BATCH}")
        given = [file.field for file in self.files]
        if twice := [name for name in ("image", "mask", "control") if given.count(name) > 1]:
            raise UserError(f"found {twice[0]} twice; expected it once")

    def text(self) -> str:
        """As JSON; bytes of a file's name that are no UTF-8 are escaped."""
        text = json.dumps({"form": FORM} | dataclasses.asdict(self), ensure_ascii=False)
        return text.encode(errors="backslashreplace").decode()

    def entry(self, folder: epath.PathLike, out: epath.PathLike, moved: Mapping[str, Any]) -> Entry:
        """The edit by its files.

        Args:
          folder: of the result.
          out: the file to write.
          moved: where pictures are now, by field, if not where they were.

        Raises:
          UserError: no such edit.
        """
        paths = {name: [resolved(folder, file.path) for file in self.files if file.field == name]
                 for name in PICTURES}
        for name, found in paths.items():
            now = moved.get(name) or []
            now = [now] if isinstance(now, str) else list(now)
            if now and len(now) != len(found):
                raise UserError(f"the edit has {len(found)} {name}; found {len(now)}")
            paths[name] = now or found
        references = tuple(paths.pop("references"))
        size = self.asked and "{}x{}".format(*self.asked)
        return Entry(str(out), self.prompt, self.task, references=references, size=size, scale=self.scale,
                     seed=self.seed, **{name: found[0] if found else None for name, found in paths.items()})

    @property
    def options(self) -> Options:
        return Options(self.steps, self.guidance, self.crop, self.paste, self.grow, self.step_cache)


def make(profile: Profile, request: Request, options: Options, result: Result, batch: tuple[int, int],
         opened: Mapping[str, Any], used: Sequence[File]) -> Record:
    """The record of a result."""
    task = profile.tasks[result.task]
    return Record(acejax.__version__, jax.__version__, platform(), result.task, request.prompt, result.prompt,
                  request.seed, profile.steps_of(options.steps), profile.guidance_of(options.guidance),
                  float(profile.scale(task) if request.scale is None else request.scale),
                  result.picture.shape[1::-1], options.crop, profile.paste_of(options.paste), profile.canvas.parity,
                  batch, dict(opened), tuple(used), request.size and request.size[::-1], options.grow,
                  options.step_cache)


def read(path: epath.PathLike) -> Record:
    """The record in a PNG.

    Raises:
      UserError: no such file, none in it, or a damaged one.
    """
    text = files.read_text(path, KEY)
    if text is None:
        raise UserError(f"{path}: no record of an edit in it; `acejax edit` keeps one in the PNG files that it writes")
    try:
        found = json.loads(text)
        if found.pop("form") != FORM:
            raise UserError("of another version of acejax")
        found["files"] = tuple(_typed(File, file) for file in found["files"])
        record = _typed(Record, found)
        printed = [record.acejax, record.jax, record.platform, *(file.path for file in record.files),
                   *(value for value in record.opened.values() if isinstance(value, str))]
        if odd := [text for text in printed if any(unicodedata.category(letter) in CONTROLS for letter in text)]:
            raise UserError(f"found {ascii(odd[0])}")
        return record
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its record can't be read: {' '.join(str(error).split())[:200]}") from error


def changes(record: Record, entry: Entry, found: Sequence[File] | None) -> list[str]:
    """What is not as it was, a line each; nothing is made or decoded.

    Args:
      entry: the edit by its files, as they are now.
      found: weights and LoRAs, as they are now; None: they are not looked at.
    """
    told = [] if record.acejax == acejax.__version__ else [f"acejax was {record.acejax}, is {acejax.__version__}"]
    before = {name: iter([file for file in record.files if file.field == name]) for name in PICTURES}
    for name, path in entry.inputs:
        file = next(before[name])
        try:
            if "://" not in path and not os.path.isfile(path):  # a device has no end
                raise UserError("no file")
            checksum = hashlib.sha256(pictures.read(path)).hexdigest()
        except UserError:
            told.append(f"{name} {path} is not there")
            continue
        if checksum != file.checksum:
            told.append(f"{name} {path} has changed (SHA-256 was {file.checksum[:12]}, is {checksum[:12]})")
    for field in ("weights", "lora") if found is not None else ():
        was, now = ([file for file in part if file.field == field] for part in (record.files, found))
        if len(was) != len(now):
            told.append(f"{field}: {len(was)} files were read, {len(now)} are there")
            continue
        told += [f"{field} {after.path} has changed (xxh3 was {file.checksum[:12]}, is {after.checksum[:12]})"
                 for file, after in zip(was, now, strict=True) if file.checksum != after.checksum]
    return told


def relative(folder: epath.PathLike, path: str) -> str:
    """A path as seen from a folder, with a dot before it; one in a bucket as it is."""
    if "://" in path or "://" in str(folder):
        return path if "://" in path else os.path.abspath(path)
    found = os.path.relpath(os.path.abspath(path), os.path.abspath(folder))
    return found if found.startswith("..") else f"./{found}"


def resolved(folder: epath.PathLike, path: str) -> str:
    """The way back of `relative`; what has no dot before it is no such path."""
    return os.path.normpath(os.path.join(str(folder), path)) if path.startswith(".") else path


def platform() -> str:
    """jax's platform and kind of device."""
    device = jax.devices()[0]
    return device.platform if device.device_kind == device.platform else f"{device.platform} {device.device_kind}"


def _typed(cls: type, given: Mapping[str, Any]) -> Any:
    return cls(**{field.name: fields.value(given[field.name], field.type, field.name)
                  for field in dataclasses.fields(cls) if field.name in given or field.default is dataclasses.MISSING})
