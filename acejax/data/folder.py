"""A folder of pictures as a manifest: what a file is for stands in its name.

    pets/insert/cat.jpg         the target of the sample "cat" of the task "insert"
    pets/insert/cat.txt         its prompt
    pets/insert/cat.edit.jpg    the picture to edit
    pets/insert/cat.mask.png    where to generate (white)
    pets/insert/cat.ref.jpg     a reference; more are cat.ref2.jpg, cat.ref3.jpg ...

Pictures directly in the folder belong to the task "default". Hidden files and .md files are passed over; any other
file that has no place is a fault, as a mistyped name would be lost.
"""

import collections
import dataclasses
import re
from concurrent import futures
from typing import Any

from etils import epath

from acejax.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".jp2")
PROMPT = ".txt"
NO_TASK = "default"
_ROLE = re.compile(r"(.+)\.(edit|mask|ref\d*)")
_AT_ONCE = 16  # prompts read side by side, for buckets


@dataclasses.dataclass(frozen=True)
class Found:
    """names by line - 1; (line, Row's fields) of good samples; (line, field, message) of faults."""

    names: tuple[str, ...]
    samples: tuple[tuple[int, dict[str, Any]], ...]
    faults: tuple[tuple[int, str, str], ...]


def read(path: epath.Path) -> Found:
    """Sort a folder's files into samples and read their prompts.

    Raises:
      UserError: a folder that cannot be listed, or that holds a manifest in place of prompts.
    """
    sets: dict[str, dict[str, list[epath.Path]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    try:
        for entry in _visible(path):
            if entry.suffix.lower() in PICTURES + (PROMPT, ".md", ".jsonl", ".csv", ".json", ".tsv"):
                _sort_in(sets, "", entry)  # by its name a file: a bucket need not be asked
            elif entry.is_dir():
                for file in _visible(entry):
                    _sort_in(sets, f"{entry.name}/", file)
            else:
                _sort_in(sets, "", entry)
    except OSError as error:
        raise UserError(f"folder {path} cannot be read: {error}") from error
    lists = sorted(name for name, files in sets.items() if any(
        file.suffix in (".jsonl", ".csv") for file in files["other"]))
    if lists and not any(files["prompt"] for files in sets.values()):
        raise UserError(f"folder {path}: found {lists[0]} and no prompts in {PROMPT} files; expected its own path, "
                        f"{path / lists[0]}")
    names = tuple(sorted(sets))
    with futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        prompts = list(pool.map(_prompt, (sets[name]["prompt"] for name in names)))
    samples, faults = [], []
    for line, (name, prompt) in enumerate(zip(names, prompts, strict=True), 1):
        wrong = _wrong(sets[name], prompt)
        if wrong:
            faults += [(line, field, message) for field, message in wrong]
            continue
        one = {role: str(files[0]) for role, files in sets[name].items() if files and role != "prompt"}
        samples.append((line, {
            "task": name.rpartition("/")[0] or NO_TASK, "prompt": prompt, "target": one["target"],
            "image": one.get("edit"), "mask": one.get("mask"),
            "references": tuple(one[role] for role in _references(sets[name]))}))
    return Found(names, tuple(samples), tuple(faults))


def _visible(path: epath.Path) -> list[epath.Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.name != "Thumbs.db"]


def _sort_in(sets: dict[str, dict[str, list[epath.Path]]], task: str, file: epath.Path) -> None:
    suffix = file.suffix.lower()
    if suffix == ".md":
        return
    stem = file.name[:-len(suffix)] if suffix else file.name
    if suffix == PROMPT:
        sets[task + stem]["prompt"].append(file)
    elif suffix not in PICTURES:
        sets[task + file.name]["other"].append(file)
    elif role := _ROLE.fullmatch(stem):
        sets[task + role[1]]["ref1" if role[2] == "ref" else role[2]].append(file)
    else:
        sets[task + stem]["target"].append(file)


def _references(files: dict[str, list[epath.Path]]) -> list[str]:
    return sorted((role for role in files if role.startswith("ref")), key=lambda role: int(role[3:]))


def _prompt(files: list[epath.Path]) -> str | tuple[str, str]:
    """A prompt, or (field, message)."""
    if not files:
        return "prompt", f"is missing; expected a file NAME{PROMPT} beside the picture"
    try:
        text = files[0].read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return "prompt", f"{files[0].name}: found the byte 0x{error.object[error.start]:02X}; expected UTF-8"
    except OSError as error:
        return "prompt", f"{files[0].name} cannot be read: {error}"
    if not text or "\0" in text:
        return "prompt", f"{files[0].name} is empty" if not text else f"{files[0].name}: found NUL; expected text"
    return text


def _wrong(files: dict[str, list[epath.Path]], prompt: str | tuple[str, str]) -> list[tuple[str, str]]:
    if files.get("other"):
        return [("", f"found a file of another kind; expected pictures ({', '.join(PICTURES)}) and prompts ({PROMPT})")]
    wrong = [prompt] if isinstance(prompt, tuple) else []
    if not files.get("target"):
        wrong.append(("target", "is missing; expected a picture NAME.png, .jpg, .webp ..."))
    if files.get("mask") and not files.get("edit"):
        wrong.append(("mask", "found a mask without a picture to edit; expected NAME.edit.* too"))
    for role, found in files.items():
        if len(found) > 1:
            wrong.append((role, f"found {' and '.join(sorted(file.name for file in found))}; expected one of them"))
    numbers = [int(role[3:]) for role in _references(files)]
    if numbers != list(range(1, len(numbers) + 1)):
        wrong.append(("references", f"found the numbers {', '.join(map(str, numbers))}; expected 1 (NAME.ref.*), 2 ... "
                                    "without a gap"))
    return wrong
