"""The weights that `acejax edit` works with, and what a record says of them."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from acejax.data.encoders import DTYPES, EncodersConfig
from acejax.data.hashes import Hashes
from acejax.edit.editor import Editor
from acejax.edit.profile import Profile
from acejax.edit.record import MOST_BATCH, File
from acejax.errors import UserError
from acejax.model.autoencoder import SMALLEST_TILE
from acejax.parallel import kernels
from acejax.weights import hub

Lora = tuple[str, float]  # file, strength
Used = Callable[[Hashes], list[tuple]]  # fields of the `File`s that are read
FLAGS = ("demo", "weights", "base", "dtype", "eight_bits", "int8_products", "staged", "offload", "tile", "mesh",
         "contour", "depth")
SWITCHES = ("demo", "int8_products", "staged", "offload")
PATHS = ("weights", "base", "contour", "depth")
PARTS = ("vae", "text_encoder_2", "text_encoder", "tokenizer", "tokenizer_2")
NOTES = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "acejax" / "hashes.json"


@dataclasses.dataclass(frozen=True)
class Opened:
    """An editor, and where its weights came from.

    Attributes:
      flags: those of `FLAGS` that it was opened with, paths absolute.
      used: the fields of `files`.
    """

    editor: Editor
    flags: Mapping[str, Any]
    used: Used

    @functools.cached_property
    def files(self) -> tuple[File, ...]:
        """Weights and LoRAs with their checksums, paths absolute; those that come with acejax by name.

        They are hashed when they are first asked for: tens of GB are not read for a request that can't be.
        """
        hashes = Hashes(NOTES)
        found = tuple(File(*one) for one in self.used(hashes))
        hashes.keep()
        return found


def open_weights(flags: Mapping[str, Any], loras: Sequence[Lora], parity: str | None) -> Opened:
    """The editor that the flags ask for.

    Raises:
      UserError: no such weights, a LoRA of another geometry, parity with weights that nothing was released for.
    """
    flags = {name: _absolute(value) if name in PATHS and value else value for name, value in flags.items()
             if name in FLAGS}
    for name in ("contour", "depth"):
        if flags[name] and not pathlib.Path(flags[name]).exists():
            raise UserError(f"--{name}={flags[name]}: no such file or folder")
    editor, weights = (_small if flags["demo"] else _released)(flags, loras, parity)

    def used(hashes: Hashes) -> list[tuple]:
        found = weights(hashes) + [("lora", _absolute(path), hashes.of(hub.local(path)), scale)
                                   for path, scale in loras]
        for path in (pathlib.Path(flags[name]) for name in ("contour", "depth") if flags[name]):
            found += [("weights", str(file.absolute()), hashes.of(file), None) for file in
                      (sorted(path.rglob("*.safetensors")) or sorted(path.rglob("*.bin")) if path.is_dir() else [path])]
        return found

    return Opened(editor, flags, used)


def _small(flags: Mapping[str, Any], loras: Sequence[Lora], parity: str | None) -> tuple[Editor, Used]:
    if given := [name for name in FLAGS if flags[name] and name not in ("demo", "weights")]:
        raise UserError(f"--{given[0]} is for FLUX's weights, not for those of --demo")
    if parity:
        raise UserError(f"--parity={parity}: nothing was released that the small weights could be held against")
    from acejax.demo.weights import SHIPPED, load_editor

    folder = pathlib.Path(flags["weights"] or SHIPPED)
    editor = load_editor(folder, loras=loras)
    return editor, lambda hashes: [("weights", path.name if not flags["weights"] else str(path), hashes.of(path), None)
                                   for path in sorted(folder.glob("*.safetensors")) + [folder / "weights.json"]]


def _released(flags: Mapping[str, Any], loras: Sequence[Lora], parity: str | None) -> tuple[Editor, Used]:
    """FLUX's weights; headers are read, the rest when the first edit is made."""
    from acejax.edit.annotators import annotator
    from acejax.edit.models import Models, ModelsConfig

    dtype = flags["dtype"] or "bfloat16"
    if dtype in DTYPES:  # others are told by `ModelsConfig`
        kernels.choose("auto", kernels.device_of(), dtype, where="--")  # before anything comes from the hub
    base = flags["base"]
    base = str(hub.fetch(base)) if hub.looks_like_id(base) else base
    if missing := [part for part in PARTS if not pathlib.Path(base, part).exists()]:
        raise UserError(f"--base={base}: no {', '.join(missing)} there; expected FLUX.1's folder with its parts")
    encoders = EncodersConfig(*(f"{base}/{part}" for part in PARTS[:3]), tokenizers=base, dtype=dtype,
                              tile=_tile(flags["tile"]), reference=parity == "reference")
    models = Models(ModelsConfig(flags["weights"] or base, encoders, dtype, eight_bits=flags["eight_bits"],
                                 int8_products=bool(flags["int8_products"]),
                                 staged=flags["staged"], offload=flags["offload"], mesh=_mesh(flags["mesh"])), NOTES)
    maps = {name: flags[name] for name in ("contour", "depth") if flags[name]}
    profile = Profile.of(models.config, parity)
    editor = Editor(profile, models.sample, models.encode_pictures, models.decode_latents, models.encode_prompts,
                    lora=models.lora(loras), annotate=annotator(maps, parity), batch=MOST_BATCH,  # --batch is less
                    check_size=models.check_size)
    return editor, lambda hashes: [("weights", path, checksum, None) for path, checksum in models.checksums(hashes)]


def _tile(cells: str | None) -> int | None:
    if cells is None:
        return None
    if not cells.isdecimal() or int(cells) < SMALLEST_TILE:
        raise UserError(f"--tile={cells}: expected {SMALLEST_TILE} cells of 8 pixels or more, such as 64")
    return int(cells)


def _mesh(axes: str | None) -> dict[str, int] | None:
    """"fsdp=4,tensor=2" as sizes."""
    if not axes:
        return None
    try:
        return {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    except ValueError:
        raise UserError(f"--mesh={axes}: expected axes and sizes, such as fsdp=4,tensor=2") from None


def _absolute(path: str) -> str:
    return str(pathlib.Path(path).absolute()) if pathlib.Path(path).exists() else path


def lora(text: str) -> Lora:
    """FILE[:SCALE].

    Raises:
      UserError: a scale that is no number.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or epath.Path(text).exists():
        return text, 1.0
    try:
        if math.isfinite(strength := float(scale)):
            return path, strength
        raise ValueError
    except ValueError:
        if scale.startswith("//"):  # gs://...
            return text, 1.0
        raise UserError(f"--lora={text}: the scale is {scale!r}; expected a number") from None
