"""`acejax edit --from=out.png`: the edit that a PNG records, verified and made again."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from acejax.cli.edit_run import edit, tell
from acejax.cli.edit_weights import FLAGS, SWITCHES, Lora, open_weights
from acejax.data import written
from acejax.data.progress import Progress
from acejax.edit import files, manifest, record
from acejax.errors import UserError


def again(path: str, out: str | None, moved: Mapping[str, Any], loras: Sequence[Lora]) -> int:
    """Compare the pixels, and write the result where `out` is given.

    Args:
      moved: where pictures and weights are now, by flag, if not where they were.
      loras: likewise; none: where they were.

    Returns:
      0: the same pixels, 1: others.

    Raises:
      UserError: what was moved or has changed, all of it.
    """
    kept, folder = record.read(path), epath.Path(path).parent
    if out and manifest.place(out) == manifest.place(path):
        raise UserError(f"--out={out} is the file that --from compares with; expected another one")
    entry = kept.entry(folder, out or path, moved)
    flags = dict.fromkeys(FLAGS) | {name: record.resolved(folder, value) if isinstance(value, str) else value
                                    for name, value in kept.opened.items() if name in FLAGS}
    if odd := [name for name, value in flags.items() if value is not None and isinstance(value, bool) != (
            name in SWITCHES)]:
        raise UserError(f"{path}: its record can't be read: {odd[0]} is {flags[odd[0]]!r}")
    if not flags["demo"] and not flags["base"]:
        raise UserError(f"{path}: its record can't be read: it names no weights")
    flags |= {name: moved[name] for name in ("weights", "base", "contour", "depth") if moved.get(name)}
    before = [(record.resolved(folder, file.path), file.scale) for file in kept.files if file.field == "lora"]
    if loras and len(loras) != len(before):
        raise UserError(f"{path} was made with {len(before)} LoRAs; found {len(loras)}")
    loras = [(name, scale) for (name, _), (_, scale) in zip(loras or before, before, strict=True)]
    told = record.changes(kept, entry, None)
    try:
        opened = open_weights(flags, loras, kept.parity)
        told = record.changes(kept, entry, opened.files)
    except UserError as error:
        told.append(str(error))
    if told:
        raise UserError(f"{path} can't be made again: {'; '.join(told)}")
    if out:
        written.check_folder(out)
        files.check_size(out, kept.size[::-1])
    place, count = kept.batch
    with Progress(1, "edit", "edits") as progress:
        result, about = edit([entry] * count, opened, kept.options, tell(progress))[place]
    if out:
        files.write_picture(out, result.picture, {record.KEY: about.text()}, files.colors(entry.image))
        print(f"wrote {out}")
    first = files.read_picture(path)
    if first.shape == result.picture.shape and (first == result.picture).all():
        print(f"{path}: the same pixels")
        return 0
    print(f"{path}: {_difference(first, result.picture)}; it was made with jax {kept.jax} on {kept.platform}, and now "
          f"with jax {jax.__version__} on {record.platform()}")
    return 1


def _difference(first: np.ndarray, second: np.ndarray) -> str:
    if first.shape != second.shape:
        sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (first, second))
        return f"other sizes, {sizes} pixels"
    apart = np.abs(first.astype(np.int16) - second).max(-1)
    return f"{np.count_nonzero(apart):,} of {apart.size:,} pixels differ, by {apart.max()} of 255 at most"
