"""LoRA files from one format to another, with the same report as a model's conversion."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import xxhash

from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import layout, lora_formats, lora_pairs, save, trees
from acejax.weights.convert import Report, Row, look
from acejax.weights.layout import Piece
from acejax.weights.source import FLOATS, NAMES, exists, open_source, same_bits, shown


def convert_lora(source: pathlib.Path, target: pathlib.Path, to: str, config: MMDiTConfig, dtype: Any = None) -> Report:
    """Write a LoRA file as "comfy" or "diffusers".

    The report's `exact` counts the tensors of the modules to which what was written adds the same, bit for bit, once
    its modules are the source's again. An alpha that goes into the metadata counts as a source of its module's B.

    Raises:
      UserError: what `acejax.load_lora` refuses, a target that is there already or can't be written, a dtype that no
        LoRA is stored as, or a number that the dtype can't hold.
    """
    if dtype is not None and NAMES[np.dtype(dtype)] not in FLOATS:
        raise UserError(f"{source}: a LoRA is not stored as {NAMES[np.dtype(dtype)]}; expected --dtype float32, "
                        "bfloat16 or float16")
    if exists(target):
        raise UserError(f"{target}: is there already; give another place, nothing is overwritten")
    found = lora_formats.read_lora(source, config)
    lora = trees.nested(lora_pairs.from_foreign(config, found.layout, found.pairs))
    made, metadata = lora_formats.export(config, lora, to, dtype)
    rows = _lora_rows(source, found, made, layout.meet(lora_pairs.kernels(config, found.layout),
                                                       lora_pairs.kernels(config, lora_formats.LAYOUTS[to])))
    with save.beside(target) as place:
        save.write_tensors(place, {tensor.key: tensor.stored for tensor in made}, metadata)
        there = open_source(place).tensors
        if not all(same_bits(tensor.stored, there[tensor.key][...]) for tensor in made):
            raise UserError(f"{target}: what was written does not read back as it was; is the disk sound?")
        again = lora_formats.read_lora(place, config)
        back = trees.nested(lora_pairs.from_foreign(config, again.layout, again.pairs))
        same = lora_pairs.adds_the_same(config, found.layout, lora, back)
        if not all(same[key] for key in same.keys() - found.roles.keys()):
            raise RuntimeError(f"{target}: would change a layer that {source} leaves alone")
    exact = sum(len(roles) for key, roles in found.roles.items() if same[key])
    return Report(str(source), "FLUX LoRA", dataclasses.asdict(config), found.layout, to, len(found.tensors),
                  (), (), (), exact, rows, (str(target),))


def _lora_rows(source: pathlib.Path, found: lora_formats.Found, made: list[lora_formats.Made],
               met: dict[str, list[Piece]]) -> list[Row]:
    """A row for each tensor of a LoRA to be written; `met` is the weights' meeting of the two layouts."""
    rows = []
    alphas = any(tensor.role == "alpha" for tensor in made)
    for tensor in made:
        weights = [key for key in dict.fromkeys(piece.source for piece in met[tensor.weight]) if key in found.roles]
        if not tensor.held:
            raise _beyond(source, found, tensor, weights)
        modules = [found.roles[key] for key in weights]
        factors = [roles[tensor.role] for roles in modules if tensor.role in roles]
        more = [roles["alpha"] for roles in modules if "alpha" in roles and tensor.role == "up" and not alphas]
        name = NAMES[tensor.stored.dtype]
        stored = NAMES[layout.common(found.tensors[key].dtype for key in factors)] if factors else name
        row, hashed = Row(tensor.key, tensor.stored.shape, name, (*factors, *more), stored), xxhash.xxh3_64()
        look(tensor.exact, tensor.stored, row, hashed)
        rows.append(dataclasses.replace(row, xxh3=hashed.hexdigest()))
    return rows


def _beyond(source: pathlib.Path, found: lora_formats.Found, tensor: lora_formats.Made, weights: list[str]
            ) -> UserError:
    """The error for a tensor that its dtype can't hold, by the source tensor that has the most to do with it."""
    tops = {}
    for weight in weights:
        key, scale = found.roles[weight].get(tensor.role, found.roles[weight]["up"]), found.pairs[weight][2][0]
        top = float(np.abs(found.tensors[key].astype(np.float64)).max())
        tops[key] = top * abs(float(scale)) if tensor.role == "up" else top
    largest = float(np.abs(tensor.exact.astype(np.float64)).max())
    wanted = "a smaller alpha" if tensor.role == "alpha" else "another --dtype"
    return UserError(f"{source}: {shown(max(tops, key=tops.get))} gives numbers up to {largest:g}, beyond "
                     f"{NAMES[tensor.stored.dtype]}; expected {wanted}")
