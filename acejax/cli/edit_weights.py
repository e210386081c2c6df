"""The weights that `acejax edit` works with, and what a record says of them."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from acejax.data.hashes import Hashes
from acejax.edit.editor import Editor
from acejax.edit.record import File
from acejax.errors import UserError

Lora = tuple[str, float]  # file, strength


@dataclasses.dataclass(frozen=True)
class Opened:
    """An editor, and where its weights came from.

    Attributes:
      flags: those that name the weights, paths absolute: "demo", "weights", "base".
      files: weights and LoRAs with their checksums, paths absolute; those that come with acejax by name.
    """

    editor: Editor
    flags: Mapping[str, Any]
    files: tuple[File, ...]


def open_weights(flags: Mapping[str, Any], loras: Sequence[Lora], parity: str | None) -> Opened:
    """The editor that the flags ask for.

    Raises:
      UserError: no such weights, a LoRA of another geometry, parity with weights that nothing was released for.
    """
    if not flags["demo"]:
        return _released(flags, loras, parity)
    if flags["base"]:
        raise UserError("--base is for FLUX's weights; with --demo give --weights=FOLDER, a demo's WORKDIR/weights")
    if parity:
        raise UserError(f"--parity={parity}: nothing was released that the small weights could be held against")
    from acejax.demo.weights import SHIPPED, load_editor

    folder, hashes = pathlib.Path(flags["weights"] or SHIPPED).absolute(), Hashes(None)
    editor = load_editor(folder, loras=loras)
    files = [File("weights", path.name if not flags["weights"] else str(path), hashes.of(path))
             for path in sorted(folder.glob("*.safetensors"))]
    files += [File("lora", str(pathlib.Path(path).absolute()), hashes.of(pathlib.Path(path)), scale)
              for path, scale in loras]
    return Opened(editor, {"demo": True, "weights": flags["weights"] and str(folder), "base": None}, tuple(files))


def _released(flags: Mapping[str, Any], loras: Sequence[Lora], parity: str | None) -> Opened:
    raise UserError("edit: add --demo to use the small weights that come with acejax")


def lora(text: str) -> Lora:
    """FILE[:SCALE].

    Raises:
      UserError: a scale that is no number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or epath.Path(text).exists():
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        if scale.startswith("//"):  # gs://...
            return text, 1.0
        raise UserError(f"--lora={text}: the scale is {scale!r}; expected a number") from None
