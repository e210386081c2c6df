"""What a source holds: which model, in which layout and of which geometry; every tensor is accounted for."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from acejax.errors import UserError
from acejax.model.config import AutoencoderConfig, CLIPConfig, MMDiTConfig, T5Config
from acejax.weights import geometry, keymaps
from acejax.weights.keymaps import Config
from acejax.weights.layout import Layout, Shape
from acejax.weights.source import (
    FLOATS,
    NAMES,
    Grown,
    Scaled,
    Source,
    Tensor,
    chunks,
    exists,
    open_source,
    same_bits,
    shown,
)

# our kind of model -> its name in messages, and its folder in a diffusers pipeline
KINDS = {MMDiTConfig: ("FLUX transformer", "transformer"), AutoencoderConfig: ("FLUX autoencoder", "vae"),
         T5Config: ("T5 encoder", "text_encoder_2"), CLIPConfig: ("CLIP text encoder", "text_encoder")}
FLOAT8 = tuple(NAMES[np.dtype(dtype)] for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
GROW = (384, 448, "reference")
_QUANTISED = re.compile(r".*\.(absmax|quant_map|nested_absmax|quant_state\..+|qweight|qzeros|wscales|comfy_quant|"
                        r"weight_scale)")
# columns of the old img_in weight -> first column in the new; noisy, edit, modify and mask keep their places
_GROWN = {(64, 384): ((slice(0, 64), 0),), (64, 448): ((slice(0, 64), 0),),
          (384, 448): ((slice(0, 128), 0), (slice(128, 384), 192))}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on disk.

    Attributes:
      path: for messages.
      config: its geometry.
      layout: how its tensors are named.
      tensors: key of the layout -> tensor; exactly those of `keymaps.expected(config, layout)`.
      names: key of the layout -> the file's own, with its prefix.
      twins: keys that only repeat another tensor.
      left_over: keys that no part of the model has (only with `allow_extra`).
      ignored: keys that are known and not needed: CLIP's projection, float8's marks and the scales already applied.
    """

    path: pathlib.Path
    config: Config
    layout: str
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    twins: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def open_model(path: str | os.PathLike, kind: type | None = None, config: Config | None = None, *,
               grow: int | str | None = None, allow_extra: bool = False) -> Model:
    """Open a model and hold its tensors against what it must have; only headers are read.

    Args:
      path: a safetensors file, an index, a folder with one, or a diffusers pipeline's folder (where `kind` chooses).
      kind: the config class of what is expected; None takes what is there.
      config: what the file must hold; None reads it off the tensors.
      grow: widen `img_in` of a transformer to 384 or 448 channels, so that the velocity stays what it was; "reference"
        widens to 448 as ACE_plus does, by a copy of the leading columns that shifts the mask block (ace_plus_ldm.py).
      allow_extra: leave tensors alone that no part of the model has, where they would be an error.

    Raises:
      UserError: see `open_source`; no known model, a geometry that the tensors do not tell, tensors that are missing,
        left over, of a wrong shape, or of a dtype that is no float.
    """
    path = pathlib.Path(path)
    if kind and exists(path / "model_index.json"):
        path = path / KINDS[kind][1]
    return identify(open_source(path), kind, config, grow=grow, allow_extra=allow_extra)


def identify(source: Source, kind: type | None = None, config: Config | None = None, *, grow: int | str | None = None,
             allow_extra: bool = False) -> Model:
    """What `open_model` does once a source is open."""
    path = source.path
    kind, layout, names, outside = _detect(source, (kind,) if kind else tuple(KINDS), config)
    table = keymaps.layouts_of(config or kind())[layout]
    twins = _twins(source, table, names)
    inside = _floats(path, {key: source.tensors[name] for key, name in names.items()})
    try:
        found = geometry.read(kind, geometry.Shapes({key: tensor.shape for key, tensor in inside.items()}, table,
                                                    source.config)) if config is None else config
        if grow is not None:
            if not isinstance(found, MMDiTConfig):
                raise UserError(f"found a {KINDS[kind][0]}; only a transformer grows")
            found, inside = _grow(found, inside, table.key("img_in/kernel"), grow, config is None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None

    expected = keymaps.expected(found, layout)
    extra = tuple(sorted([*outside, *(names[key] for key in inside.keys() - expected.keys())]))
    _check(path, inside, expected, layout, names, () if allow_extra else extra)
    used = {*names.values(), *outside, *twins}
    ignored = tuple(key for key in source.tensors if key not in used) + tuple(
        names[key] for key in names if key not in inside)
    return Model(path, found, layout, {key: inside[key] for key in expected}, names, twins, extra, ignored)


def grown(model: Model, grow: int | str) -> Model:
    """A transformer with `img_in` widened, as `open_model` says.

    Raises:
      UserError: another model, or channels that do not grow to those.
    """
    if not isinstance(model.config, MMDiTConfig):
        raise UserError(f"{model.path}: found a {KINDS[type(model.config)][0]}; only a transformer grows")
    key = keymaps.layouts_of(model.config)[model.layout].key("img_in/kernel")
    try:
        config, tensors = _grow(model.config, dict(model.tensors), key, grow, True)
    except UserError as error:
        raise UserError(f"{model.path}: {error}") from None
    return dataclasses.replace(model, config=config, tensors=tensors)


def columns(channels: int, wanted: int) -> tuple[tuple[slice, int], ...]:
    """Where the columns of `img_in` go when it grows: pairs of old columns and the first of the new ones.

    Raises:
      UserError: channels that do not grow to those.
    """
    if channels == wanted:
        return ((slice(0, channels), 0),)
    if (channels, wanted) not in _GROWN:
        raise UserError(f"img_in reads {channels} channels, which do not grow to {wanted}; expected 64 or 384 for "
                        "384 or 448")
    return _GROWN[channels, wanted]


def pipeline(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The models of a diffusers pipeline's folder, by the names of their folders; empty for any other path."""
    if not exists(folder / "model_index.json"):
        return {}
    return {name: folder / name for _, name in KINDS.values() if (folder / name).is_dir()}


def _detect(source: Source, kinds: Iterable[type],
            config: Config | None) -> tuple[type, str, dict[str, str], list[str]]:
    """Kind and layout, with what `Layout.locate` gives."""
    wanted = []
    for kind in kinds:
        for name, layout in keymaps.layouts_of(config or kind()).items():
            if located := layout.locate(source.tensors):
                return kind, name, *located
            wanted.append(f"{layout.key(layout.marker).format(i=0)!r} ({name}, {KINDS[kind][0]})")
    keys = sorted(source.tensors)
    _refuse_quantised(source.path, keys)
    if any(re.search(r"\blora_(A|B|down|up)\b", key) for key in keys):
        raise UserError(f"{source.path}: found a LoRA; expected a model (acejax.load_lora reads this file)")
    some = ", ".join(shown(key)[1:-1] for key in keys[:3]) or "no tensors"
    names = " or ".join(KINDS[kind][0] for kind in kinds)
    raise UserError(f"{source.path}: not a {names}: expected {' or '.join(wanted)}, alone or after a prefix; found "
                    f"{some}{_more(keys, 3)}")


def _twins(source: Source, layout: Layout, names: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of the file that repeat a tensor; they must really do so."""
    found = []
    for twin, key in layout.twins.items():
        name = names.get(key, "")
        other = name.removesuffix(key) + twin
        if not name.endswith(key) or other not in source.tensors:
            continue
        first, second = source.tensors[name], source.tensors[other]
        if (first.shape, first.dtype) != (second.shape, second.dtype) or not all(
                same_bits(*pair) for pair in zip(chunks(first), chunks(second), strict=True)):
            raise UserError(f"{source.path}: {shown(other)} and {shown(name)} differ; expected one and the same tensor")
        found.append(other)
    return tuple(found)


def _refuse_quantised(path: pathlib.Path, keys: Iterable[str]) -> None:
    for key in filter(_QUANTISED.fullmatch, keys):
        raise UserError(f"{path}: {shown(key)} says that the weights are quantised in a way that is not read here "
                        "(NF4, GPTQ, blocks); expected plain floats, or float8 with scale_weight")


def _floats(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float8 as bfloat16, with its `scale_weight` where there is one; the marks that go with it are dropped."""
    _refuse_quantised(path, tensors)
    found: dict[str, Tensor] = {}
    short = {key.removesuffix(".weight") for key, tensor in tensors.items() if NAMES[tensor.dtype] in FLOAT8}
    for key, tensor in tensors.items():
        module, _, name = key.rpartition(".")
        if key == "scaled_fp8" or name in ("scale_weight", "scale_input") and module in short:  # ComfyUI's
            continue
        scale = f"{key.removesuffix('.weight')}.scale_weight"
        if NAMES[tensor.dtype] in FLOAT8:
            found[key] = Scaled(tensor, _scale(path, scale, tensors.get(scale)))
        elif key.endswith(".weight") and scale in tensors:
            raise UserError(f"{path}: {shown(key)} has a scale_weight but is stored as {NAMES[tensor.dtype]}; expected "
                            "float8")
        else:
            found[key] = tensor
    return found


def _scale(path: pathlib.Path, key: str, scale: Tensor | None) -> float:
    if scale is None:
        return 1.0
    if NAMES[scale.dtype] not in FLOATS or int(np.prod(scale.shape)) != 1:
        raise UserError(f"{path}: {shown(key)} is {NAMES[scale.dtype]} of shape {scale.shape}; expected one float")
    value = float(np.asarray(scale[...], np.float32).reshape(()))
    if not np.isfinite(value):
        raise UserError(f"{path}: {shown(key)} is {value}; expected a finite scale")
    return value


def _grow(config: MMDiTConfig, tensors: dict[str, Tensor], key: str, grow: int | str,
          read: bool) -> tuple[MMDiTConfig, dict[str, Tensor]]:
    if grow not in GROW:
        raise UserError(f"grow is {shown(grow)}; expected one of {', '.join(map(str, GROW))}")
    wanted = 448 if grow == "reference" else int(grow)
    tensor = tensors.get(key)
    channels = tensor.shape[1] if tensor is not None and len(tensor.shape) == 2 else None
    if (channels, wanted) not in _GROWN or not (read or config.in_channels == wanted):
        raise UserError(f"{shown(key)} reads {channels} channels; expected 64 or 384 to grow to {wanted}"
                        + ("" if read else f", and a config of {wanted}; it has {config.in_channels}"))
    blocks = ((slice(0, channels), 0),) if grow == "reference" else _GROWN[channels, wanted]
    return (dataclasses.replace(config, in_channels=wanted),
            tensors | {key: Grown(tensor, wanted, blocks)})


def _check(path: pathlib.Path, found: Mapping[str, Tensor], expected: Mapping[str, Shape], layout: str,
           names: Mapping[str, str], extra: tuple[str, ...]) -> None:
    """Every expected tensor is there, in its shape and as a float, and no other."""
    missing = [key for key in expected if key not in found]
    if missing:
        raise UserError(f"{path}: {shown(_prefix(names) + missing[0])}{_more(missing)} is missing; expected "
                        f"{expected[missing[0]]} ({len(expected)} tensors in the {layout} layout, found {len(found)})")
    if extra:
        shapes = [found[key].shape for key, name in names.items() if name == extra[0] and key in found]
        shape = f", found {shapes[0]}" if shapes else ""
        raise UserError(f"{path}: {shown(extra[0])}{_more(extra)} is left over{shape}; "
                        f"expected the {len(expected)} tensors of the {layout} layout alone")
    wrong = [key for key, shape in expected.items() if found[key].shape != shape]
    if wrong:
        raise UserError(f"{path}: {shown(names[wrong[0]])}{_more(wrong)} has shape {found[wrong[0]].shape}; "
                        f"expected {expected[wrong[0]]}")
    for key in expected:
        if NAMES[found[key].dtype] not in FLOATS:
            raise UserError(f"{path}: {shown(names[key])} is stored as {NAMES[found[key].dtype]}; expected one of "
                            f"{', '.join(FLOATS + FLOAT8)}")


def _prefix(names: Mapping[str, str]) -> str:
    """What the file has before every key."""
    key, name = next(iter(names.items()))
    return name.removesuffix(key)


def _more(keys: Any, shown: int = 1) -> str:
    return f" (and {len(keys) - shown} more)" if len(keys) > shown else ""
