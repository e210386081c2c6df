"""Reading and writing picture files."""

import io

import numpy as np
from etils import epath
from PIL import Image

from acejax.data import pictures, written
from acejax.errors import UserError

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_picture(path: epath.PathLike) -> np.ndarray:
    """A picture file as [h, w, 3] uint8, upright (EXIF), transparency on white.

    Raises:
      UserError: the file is missing, or no picture that can be read whole.
    """
    return pictures.decode(pictures.read(path), str(path))


def read_mask(path: epath.PathLike, size: tuple[int, int]) -> np.ndarray:
    """A mask file as [h, w] uint8, 255 = generate (white), binarised at half.

    Raises:
      UserError: unreadable, of another size (height, width) than its picture, or without a white pixel.
    """
    mask = np.where(pictures.decode_mask(pictures.read(path), str(path)) > 127, 255, 0).astype(np.uint8)
    pictures.check_mask(mask.shape, size, str(path))
    if not mask.any():
        raise UserError(f"mask {path} has no white pixel: nothing to generate")
    return mask


def write_picture(path: epath.PathLike, picture: np.ndarray) -> None:
    """Write [h, w, 3] uint8 in the format that the suffix names, beside and renamed.

    Raises:
      UserError: as `picture_format`.
    """
    path, buffer = epath.Path(path), io.BytesIO()
    Image.fromarray(picture).save(buffer, picture_format(path))
    written.write(path, buffer.getvalue())


def picture_format(path: epath.PathLike) -> str:
    """The format of a file to be written, by its suffix.

    Raises:
      UserError: a folder that is not there, or a suffix that names no picture format.
    """
    path = epath.Path(path)
    if not path.parent.exists():
        raise UserError(f"{path}: the folder {path.parent} is not there")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file to write")
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{path}: {path.suffix!r} names no picture format; use {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]
