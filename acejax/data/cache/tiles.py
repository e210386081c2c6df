"""A canvas in tiles, the units that are encoded: each is named by what it is made from, so that equal ones are one.

A name is a hash of the encoded bytes of the pictures and of the numbers that decide what becomes of them: it is known
from the headers alone, and another size limit renames just the tiles whose sizes change.
"""

import dataclasses
import io
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import Image

from acejax import lcu
from acejax.data import canvas, prepare
from acejax.data.augment import FULL, OWN
from acejax.data.cache.store import NONE
from acejax.data.layout import TOKEN, CanvasConfig, Layout
from acejax.data.prepare import Plan
from acejax.data.sample import Sample
from acejax.errors import UserError

RECIPE = 1  # changes when the canvas' code gives other pixels
TARGET = -1  # the unit of the target, after the references 0, 1, ...


class Names(NamedTuple):
    """Keys of a canvas' tiles.

    `mask` is NONE where everything is generated, `modify` where nothing is split. `references` has a pair for each:
    the reference, and grey of its size (NONE where nothing is split). With parity a canvas is one tile and has none.
    """

    edit: bytes
    modify: bytes
    target: bytes
    mask: bytes
    references: tuple[tuple[bytes, bytes], ...] = ()


class Hashes(NamedTuple):
    """Of a sample's pictures; b"" where there is none."""

    target: bytes
    image: bytes
    mask: bytes
    references: tuple[bytes, ...]

    @property
    def all(self) -> tuple[bytes, ...]:
        return (self.target, self.image, self.mask, *self.references)


def hashes(sample: Sample) -> Hashes:
    """Of the encoded bytes."""
    def of(data: bytes | None) -> bytes:
        return b"" if data is None else xxhash.xxh3_128_digest(data)
    return Hashes(of(sample.target), of(sample.image), of(sample.mask), tuple(map(of, sample.references)))


def names(task: str, config: CanvasConfig, plan: Plan, seen: Hashes, encoder: str) -> Names:
    """What the tiles of a sample are called; `encoder` names everything that turns a tile into what is stored."""
    layout, scale = plan.layout, float(config.scale_of(task, len(seen.references)))
    white = not seen.image or plan.mask == FULL or plan.mask == OWN and not seen.mask
    mask = ("mask", seen.image, seen.mask, plan.mask, plan.mask_seed)
    if config.parity:
        return _joined(config, layout, scale, seen, mask, encoder)
    height, width = size = layout.height, layout.target_width
    grey = _key(encoder, "grey", *size)
    whole = _key(encoder, "picture", seen.image, *size, height)
    if scale == 1 or not seen.image:
        shown = grey
    elif scale == 0:
        shown = whole
    else:
        shown = _key(encoder, "faded", seen.image, *size, scale)
    target = _key(encoder, "picture", seen.target, *size, height)
    references = tuple((_key(encoder, "picture", reference, height, unit, content),
                        _key(encoder, "grey", height, unit) if config.split else NONE)
                       for reference, unit, content in zip(seen.references, layout.widths, layout.contents,
                                                           strict=False))
    if white:
        edit, modify = (grey, shown) if config.split else (shown, NONE)
        return Names(edit, modify, target, NONE, references)
    if config.split:  # masks are binary: what is kept is kept at any scale
        edit = _key(encoder, "kept", *mask, *size)
        modify = grey if scale == 1 else _key(encoder, "changed", *mask, *size, scale)
    else:
        edit = whole if scale == 0 else _key(encoder, "both", *mask, *size, scale)
        modify = NONE
    return Names(edit, modify, target, _key("mask", *mask, *size), references)


def pixels(sample: Sample, config: CanvasConfig, plan: Plan, unit: int) -> dict[str, np.ndarray]:
    """The tiles of a unit, float32 [h, w, 3] in [-1, 1], by their names in `Names`; with the target its `mask`.

    A reference is "reference". The mask comes as stored: [h / 16, w / 16, 32] uint8 of bits, or with parity
    [h / 16, w / 16, 256] uint8, in the order of `acejax.lcu.fold_mask`.

    Raises:
      UserError: a picture that can't be decoded.
    """
    scale = config.scale_of(sample.task, len(sample.references))
    alone = dataclasses.replace(config, scales={sample.task: scale})  # which else depends on the references
    layout = plan.layout
    if config.parity:
        made = prepare.compose(sample, config, plan)
    elif unit == TARGET:
        plan = dataclasses.replace(plan, layout=Layout(layout.height, layout.widths[-1:], layout.contents[-1:]))
        made = prepare.compose(dataclasses.replace(sample, references=()), alone, plan)
    else:
        place = Layout(layout.height, (layout.widths[unit], TOKEN), (layout.contents[unit], layout.height))
        only = Sample(sample.task, "", _DOT, references=sample.references[unit:unit + 1], name=sample.name)
        try:
            made = prepare.compose(only, alone, Plan(place))
        except UserError as error:
            raise UserError(str(error).replace("reference 1 of", f"reference {unit + 1} of")) from None
        return {"reference": np.ascontiguousarray(canvas.contents(made).target[:, :layout.widths[unit]])}
    contents = canvas.contents(made)
    tiles = {"edit": contents.edit, "target": contents.target}
    if contents.modify is not None:
        tiles["modify"] = contents.modify
    folded = lcu.patchify(lcu.fold_mask(made.mask[None, ..., None]))
    folded = folded.reshape(made.mask.shape[0] // TOKEN, made.mask.shape[1] // TOKEN, -1)
    tiles["mask"] = folded if config.parity else np.packbits(folded > 0, -1)
    return tiles


def unpack(bits: np.ndarray) -> np.ndarray:
    """Mask bits [..., 32] -> [..., 256] uint8, 0 or 255."""
    mask = np.unpackbits(bits, -1)
    mask *= 255
    return mask


def _joined(config: CanvasConfig, layout: Layout, scale: float, seen: Hashes, mask: tuple, encoder: str) -> Names:
    """Everything depends on everything: the canvas is made smaller as a whole."""
    place = (*seen.all, *mask, layout.height, *layout.widths, *layout.contents, scale, config.split)
    edit, modify, target = (_key(encoder, field, "released", *place) for field in ("edit", "modify", "target"))
    return Names(edit, modify if config.split else NONE, target, _key("mask", "released", *place))


def _key(*parts: str | bytes | float) -> bytes:
    return xxhash.xxh3_128_digest(repr((RECIPE, *parts)).encode())


def _dot() -> bytes:
    """The smallest target: a reference's tile is cut from a canvas that has nothing else."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


_DOT = _dot()
