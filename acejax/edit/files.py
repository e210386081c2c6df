"""Reading and writing picture files."""

import hashlib
import io

import numpy as np
from etils import epath
from PIL import Image, PngImagePlugin

from acejax.data import pictures, written
from acejax.errors import UserError

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LONGEST = {"JPEG": 65_500, "WEBP": 16_383}  # pixels a side that a format can hold


def read_picture(path: epath.PathLike) -> np.ndarray:
    """A picture file as [h, w, 3] uint8, upright (EXIF), transparency on white.

    Raises:
      UserError: the file is missing, or no picture that can be read whole.
    """
    return hashed_picture(path)[0]


def hashed_picture(path: epath.PathLike) -> tuple[np.ndarray, str]:
    """`read_picture`, and the SHA-256 of the file's bytes."""
    data = pictures.read(path)
    return pictures.decode(data, str(path)), hashlib.sha256(data).hexdigest()


def read_mask(path: epath.PathLike, size: tuple[int, int]) -> np.ndarray:
    """A mask file as [h, w] uint8, white = generate; grey as it is stored: what an edit makes of it is its affair.

    Raises:
      UserError: unreadable, of another size (height, width) than its picture, or without a white pixel.
    """
    return hashed_mask(path, size)[0]


def hashed_mask(path: epath.PathLike, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """`read_mask`, and the SHA-256 of the file's bytes."""
    data = pictures.read(path)
    mask = pictures.decode_mask(data, str(path))
    pictures.check_mask(mask.shape, size, str(path))
    if not (mask > 127).any():
        raise UserError(f"mask {path} has no white pixel: nothing to generate")
    return mask, hashlib.sha256(data).hexdigest()


def write_picture(path: epath.PathLike, picture: np.ndarray, about: dict[str, str] | None = None,
                  colors: bytes | None = None) -> None:
    """Write [h, w, 3] uint8 in the format that the suffix names, beside and renamed.

    Args:
      about: texts by key, which a PNG keeps as iTXt chunks; other formats drop them.
      colors: the ICC profile that tells what the numbers look like; none: sRGB.

    Raises:
      UserError: as `picture_format` and `check_size`.
    """
    path, buffer, texts = epath.Path(path), io.BytesIO(), PngImagePlugin.PngInfo()
    for key, text in (about or {}).items():
        texts.add_itxt(key, text)
    kind = picture_format(path)
    check_size(path, picture.shape[:2])
    Image.fromarray(picture).save(buffer, kind, icc_profile=colors, **({"pnginfo": texts} if kind == "PNG" else {}))
    written.write(path, buffer.getvalue())


def read_text(path: epath.PathLike, key: str) -> str | None:
    """A text that a PNG keeps before its pixels; None where it has none, or the file is no PNG.

    Raises:
      UserError: the file is missing.
    """
    with pictures.opened(path) as file:
        try:
            return PngImagePlugin.PngImageFile(file).info.get(key)
        except (OSError, ValueError, SyntaxError):
            return None


def colors(path: epath.PathLike | None) -> bytes | None:
    """A picture file's ICC profile for RGB; None where it has none, or there is no such file."""
    if path is None:
        return None
    with pictures.opened(path) as file:
        profile = pictures.profile(file, str(path))
    return profile if profile and profile[16:20] == b"RGB " else None


def check_size(path: epath.PathLike, size: tuple[int, int]) -> None:
    """Raises UserError where a result (height, width) is larger than the format of its file can hold."""
    kind = _FORMATS.get(epath.Path(path).suffix.lower())
    if max(size) > _LONGEST.get(kind, max(size)):
        raise UserError(f"{path}: the result is {size[1]} x {size[0]} pixels (width x height), and {kind} holds at "
                        f"most {_LONGEST[kind]:,} a side; expected a .png")


def picture_format(path: epath.PathLike, made: bool = False) -> str:
    """The format of a file to be written, by its suffix.

    Args:
      made: its folder will be made.

    Raises:
      UserError: a folder that is not there, or a suffix that names no picture format.
    """
    path = epath.Path(path)
    if not made and not path.parent.exists():
        raise UserError(f"{path}: the folder {path.parent} is not there")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file to write")
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{path}: {path.suffix!r} names no picture format; use {', '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]
