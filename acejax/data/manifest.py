"""Manifests: a list of samples whose pictures are files, as lines of text or as a folder of pictures.

Three forms, told apart by what is found:

- ACE's text, one sample a line, fields in a fixed order with `#;#` between them (ACE_plus `data/*.csv`).
- JSONL, one object a line: {"task": ..., "prompt": ..., "target": ..., "image": ..., "mask": ..., "references": [...]}.
- a folder (`acejax.data.folder`).

What is wrong in one line is noted and the next is read. The files themselves are not looked at: a pod starts with a
million of them. `acejax.data.check` does that.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash
from etils import epath

from acejax.data import folder, identity, pictures
from acejax.data.sample import Sample
from acejax.errors import UserError

SEPARATOR = "#;#"
FIELDS = ("edit_image", "edit_mask", "ref_image", "target_image", "prompt", "data_type")  # ACE's order
IGNORED = "_"  # a field that is there and not read
LONGEST = 1 << 20  # bytes of a line

_KEYS = {"task": str, "prompt": str, "target": str, "image": str, "mask": str, "references": list, "detail": str}
_NEEDED = ("task", "prompt", "target")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One sample: `line` counts from 1 (in a folder, samples by name), the rest is `Sample`'s with paths for bytes."""

    line: int
    task: str
    prompt: str
    target: str
    image: str | None = None
    mask: str | None = None
    references: tuple[str, ...] = ()
    detail: str = ""

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """(field, path) of each picture."""
        named = [("target", self.target), ("image", self.image), ("mask", self.mask)]
        return tuple(pair for pair in named if pair[1]) + tuple(
            (f"references[{index}]", path) for index, path in enumerate(self.references))


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong in one field of one line; `field` is "" where it is the line as a whole."""

    line: int
    field: str
    message: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was read. `names` are a folder's samples, by line."""

    path: str
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    names: tuple[str, ...] = ()
    fields: tuple[str, ...] = FIELDS
    prefix: str | None = None
    digest: str = ""

    def where(self, line: int) -> str:
        """A line, for messages: "pairs.jsonl:12", "folder/insert/cat"."""
        name = epath.Path(self.path).name or self.path
        return f"{name}/{self.names[line - 1]}" if self.names else f"{name}:{line}"

    def sample(self, row: Row, unit: int | None = None) -> Sample:
        """A row with its pictures read, each file once.

        Args:
          row: one of `rows`.
          unit: a reference that alone is read, -1: all but references, None: all. What is not read is b"".

        Raises:
          UserError: a file that cannot be read.
        """
        name, read = self.where(row.line), functools.cache(pictures.read)

        def picture(path: str | None, of: int) -> bytes | None:
            return None if not path else read(path) if unit in (None, of) else b""

        try:
            target, image, mask = (picture(path, -1) for path in (row.target, row.image, row.mask))
            references = tuple(picture(path, number) for number, path in enumerate(row.references))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        return Sample(row.task, row.prompt, target, image, mask, references, name, row.detail)

    def told(self, fault: Fault) -> str:
        """A fault as one line of text."""
        return f"{self.where(fault.line)}: {f'{fault.field}: ' if fault.field else ''}{fault.message}"


def read(path: epath.PathLike, fields: Sequence[str] = FIELDS, prefix: epath.PathLike | None = None) -> Manifest:
    """Read a manifest, all of it whatever its faults.

    Args:
      path: a text file or a folder.
      fields: the order of the fields in ACE's text. `ref_image` may come more than once; `_` is a field not read.
      prefix: where relative paths start; by default the manifest's folder.

    Raises:
      UserError: nothing there, not text, or fields that make no sample. Faults of lines are not raised.
    """
    path, fields = epath.Path(path), _known(fields)
    base = _base(path.parent if prefix is None else prefix)
    kept = {"path": str(path), "fields": fields, "prefix": None if prefix is None else str(prefix)}
    try:
        if path.is_dir():
            found = folder.read(path)
            rows = tuple(Row(line, **sample) for line, sample in found.samples)
            faults = tuple(Fault(*fault) for fault in found.faults)
            return Manifest(rows=rows, faults=faults, names=found.names, digest=_digest(repr(found).encode()), **kept)
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"manifest {path}: no such file or folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"manifest {path} cannot be read: {error}") from error
    _refuse_other_files(path, data[:4096])
    rows, faults, json_lines = [], [], None
    for line, content in _lines(data):
        if len(content) > LONGEST:
            faults.append(Fault(line, "", f"found {len(content):,} bytes; expected at most {LONGEST:,} in a line"))
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            faults.append(Fault(line, "", f"found the byte 0x{content[error.start]:02X} at position {error.start + 1}; "
                                          "expected UTF-8"))
            continue
        if not text.strip():
            continue
        if json_lines is None:
            json_lines = path.suffix in (".jsonl", ".ndjson") or text.lstrip()[0] == "{" and SEPARATOR not in text
        values, wrong = _from_json(text) if json_lines else _from_text(text, fields)
        wrong += _wrong_values(values)
        faults += [Fault(line, *fault) for fault in wrong]
        if not wrong:
            rows.append(_row(line, values, base))
    return Manifest(rows=tuple(rows), faults=tuple(faults), digest=_digest(data), **kept)


class Source(Sequence[Sample]):
    """A manifest's samples, pictures read when they are asked for. In another process the manifest is read again.

    Args:
      skip_faults: leave lines with faults out, instead of refusing the manifest.

    Raises:
      UserError: the manifest has faults or no sample; when a sample is asked for, a file that cannot be read.
    """

    def __init__(self, manifest: Manifest, skip_faults: bool = False):
        if manifest.faults and not skip_faults:
            lines = len({fault.line for fault in manifest.faults})
            raise UserError(f"{manifest.told(manifest.faults[0])}; {lines} of {lines + len(manifest.rows)} samples "
                            f"have faults, `acejax data check {manifest.path}` lists them")
        if not manifest.rows:
            raise UserError(f"manifest {manifest.path}: found no sample")
        self.manifest = manifest
        self._skip_faults = skip_faults

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.manifest.sample(self.manifest.rows[index])

    def pick(self, index: int, unit: int) -> Sample:
        """A sample with no more of its pictures than a unit of its canvas needs, as `Manifest.sample`."""
        return self.manifest.sample(self.manifest.rows[index], unit)

    def fingerprint(self, index: int) -> str:
        """What a sample is made of: its text, and its files by name, from where the manifest's paths start."""
        row, base = self.manifest.rows[index], _base(self.manifest.prefix or epath.Path(self.manifest.path).parent)
        files = [(field, path.removeprefix(base)) for field, path in row.files]
        return repr((row.task, row.prompt, row.detail, files))

    def identity(self) -> str | None:
        """Another one when the manifest or a file of its may have changed; None for files in a bucket."""
        files = {path for row in self.manifest.rows for _, path in row.files}
        return None if any("://" in path for path in files) else identity.of_files(self.manifest.digest, files)

    @property
    def path(self) -> str:
        return self.manifest.path

    @property
    def kinds(self) -> set[tuple[str, int]]:
        """(task, number of references) of its samples."""
        return {(row.task, len(row.references)) for row in self.manifest.rows}

    def __reduce__(self):
        kept = self.manifest
        return _again, (kept.path, kept.fields, kept.prefix, kept.digest, self._skip_faults)


def _again(path: str, fields: tuple[str, ...], prefix: str | None, digest: str, skip_faults: bool) -> Source:
    manifest = read(path, fields, prefix)
    if manifest.digest != digest:
        raise UserError(f"manifest {path} has changed since this run began")
    return Source(manifest, skip_faults)


def _known(fields: Sequence[str]) -> tuple[str, ...]:
    fields = tuple(field.strip() for field in (fields.split(",") if isinstance(fields, str) else fields))
    strange = [field for field in fields if field not in (*FIELDS, IGNORED)]
    twice = sorted({field for field in fields if fields.count(field) > 1} - {"ref_image", IGNORED})
    missing = [field for field in ("target_image", "prompt") if field not in fields]
    if strange or twice or missing:
        why = ("does not know " + ", ".join(map(repr, strange)) if strange else
               f"names {twice[0]} twice" if twice else f"lacks {missing[0]}")
        raise UserError(f"fields {','.join(fields)!r} {why}; expected an order of {', '.join(FIELDS)} with "
                        f"target_image and prompt ({IGNORED} is a field that is not read)")
    return fields


def _base(path: epath.PathLike) -> str:
    base = str(path)
    return "" if base in ("", ".") else base.rstrip("/") + "/"


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _refuse_other_files(path: epath.Path, start: bytes) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"manifest {path}: found UTF-16; expected UTF-8")
    if b"\0" in start:
        raise UserError(f"manifest {path}: found a binary file; expected lines of text, or a folder of pictures")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and path.suffix in (".json", ".jsonl", ".ndjson"):
        raise UserError(f"manifest {path}: found a JSON list; expected an object on each line (jq -c '.[]' makes them)")


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) without byte order mark and line ends."""
    for line, content in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        yield line, content.removesuffix(b"\r")


Values = dict[str, Any]
Wrong = list[tuple[str, str]]  # (field, message)


def _from_text(text: str, fields: tuple[str, ...]) -> tuple[Values, Wrong]:
    parts = [part.strip() for part in text.split(SEPARATOR)]
    if len(parts) != len(fields):
        hint = f"; a prompt with {SEPARATOR} in it needs JSONL" if len(parts) > len(fields) else ""
        return {}, [("", f"found {len(parts)} field{'s' * (len(parts) > 1)}; expected {len(fields)} with {SEPARATOR} "
                         f"between them ({', '.join(fields)}){hint}")]
    named = dict(zip(fields, parts, strict=True))
    references = [part for field, part in zip(fields, parts, strict=True) if field == "ref_image" and part]
    return {"task": named.get("data_type") or folder.NO_TASK, "prompt": named["prompt"],
            "target": named["target_image"], "image": named.get("edit_image") or None,
            "mask": named.get("edit_mask") or None, "references": references}, []


def _from_json(text: str) -> tuple[Values, Wrong]:
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object comes last
        return dict(found)
    try:
        values = json.loads(text, object_pairs_hook=keep)
    except (ValueError, RecursionError) as error:
        said = "too deep or too long"
        if isinstance(error, json.JSONDecodeError):
            said = f"{error.msg}, column {error.colno}"
        return {}, [("", f"found no JSON ({said}); expected an object, like {{\"task\": ..., \"prompt\": ..., ...}}")]
    if not isinstance(values, dict):
        return {}, [("", f"found {_type(values)}; expected an object, like {{\"task\": ..., \"prompt\": ..., ...}}")]
    wrong = []
    names = [name for name, _ in pairs]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            wrong.append((_shown(name), f"is there {names.count(name)} times"))
        if name not in _KEYS:
            near = difflib.get_close_matches(name[:50], _KEYS, 1)
            wrong.append((_shown(name), f"is no field; {f'perhaps {near[0]}? ' if near else ''}the fields are "
                                        f"{', '.join(_KEYS)}"))
        elif not isinstance(values[name], _KEYS[name]) and not (values[name] is None and name not in _NEEDED):
            wrong.append((name, f"found {_type(values[name])}; expected {_type(_KEYS[name]())}"))
    wrong += [(name, "is missing") for name in _NEEDED if name not in values]
    references = values.get("references") or []
    if isinstance(references, list):
        wrong += [(f"references[{index}]", f"found {_type(path)}; expected text") for index, path in
                  enumerate(references) if not isinstance(path, str)]
    right = {name: value for name, value in values.items() if name in _KEYS and value is not None
             and isinstance(value, _KEYS[name])}
    return right | {"references": [path for path in right.get("references", []) if isinstance(path, str)]}, wrong


def _wrong_values(values: Values) -> Wrong:
    """What no form of manifest may say."""
    wrong = []
    for name in ("task", "prompt", "target", "image", "mask"):
        if isinstance(values.get(name), str) and not values[name].strip():
            wrong.append((name, "is empty" + ("; leave it out instead" if name in ("image", "mask") else "")))
    if values.get("mask") and not values.get("image"):
        wrong.append(("mask", "found a mask without a picture to edit; expected both, or neither"))
    paths = [(name, values.get(name)) for name in ("target", "image", "mask")]
    paths += [(f"references[{index}]", path) for index, path in enumerate(values.get("references", []))]
    for name, path in paths:
        if path is not None and name.startswith("references") and not path.strip():
            wrong.append((name, "is empty"))
        elif path and path.startswith(("http://", "https://")):
            wrong.append((name, "found a web address; expected a file"))
    for name, text in (*((key, values.get(key)) for key in ("task", "prompt", "detail")), *paths):
        if text and not text.isprintable() and not _encodable(text):
            wrong.append((name, "found a character that no text has (NUL or half of a surrogate pair)"))
    return wrong


def _encodable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _row(line: int, values: Values, base: str) -> Row:
    def joined(path: str | None) -> str | None:
        return path if path is None or path.startswith("/") or "://" in path else base + path
    return Row(line, values["task"].strip(), values["prompt"].strip(), joined(values["target"]),
               joined(values.get("image")), joined(values.get("mask")), tuple(map(joined, values["references"])),
               values.get("detail", ""))


def _type(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(name: str) -> str:
    """A key of the user's, fit for a message."""
    return ascii(name[:60])[1:-1]
