"""Encoded pictures: their size from the header, whether the file is whole, and their pixels.

Whatever a camera, a phone or an annotation tool writes comes out as upright 8 bits a channel; what cannot, ends in one
message. Nothing here trusts a file: only the formats below are tried (Pillow knows some that start programs), and the
header's size is looked at before memory is taken.
"""

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from etils import epath
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from acejax.errors import UserError

try:
    from PIL.AvifImagePlugin import AvifImageFile
except ImportError:  # Pillow before 11.3
    AvifImageFile = None

Size = tuple[int, int]  # height, width
Least = Size | Callable[[Size], Size] | None

MOST_PIXELS = 178_956_970  # where Pillow, too, takes a picture for an attack
EXPECTED = "a JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, PPM or JPEG 2000 picture"

_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_TURNS = {  # by orientation: what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHERS = (  # how files begin that lie among pictures and are none that can be read
    (b"version https://git-lfs", "a git-lfs pointer instead of the file (`git lfs pull` fetches it)"),
    (b"<!DOCTYPE", "a web page"), (b"<html", "a web page"), (b"<svg", "an SVG drawing"), (b"<?xml", "an XML file"),
    (b"%PDF", "a PDF"), (b"8BPS", "a Photoshop file"), (b"PK\3\4", "a zip archive"))


def read(path: epath.PathLike) -> bytes:
    """The bytes of a picture file.

    Raises:
      UserError: no such file, a folder, or a file that may not be read.
    """
    with opened(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"picture {path}: cannot be read ({_said(error)})") from error


def opened(path: epath.PathLike) -> BinaryIO:
    """A picture file for `size` and `whole`, which then read no more of it than they need.

    Raises:
      UserError: no such file, a folder, or a file that may not be read.
    """
    path = epath.Path(path)
    try:
        return path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:  # a bucket's folder is "not found"
        found = "found a folder; expected a file" if path.is_dir() else "no such file"
        raise UserError(f"picture {path}: {found}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"picture {path}: cannot be read ({_said(error)})") from error


def size(data: bytes | BinaryIO, name: str) -> tuple[int, int]:
    """Upright height and width, from the header alone.

    Raises:
      UserError: no picture, or too large.
    """
    file = _file(data)
    return _upright_size(_open(file, name), file)


def profile(data: bytes | BinaryIO, name: str) -> bytes | None:
    """The ICC profile of a picture, where it has one; raises as `size`."""
    return _open(_file(data), name).info.get("icc_profile")


def decode(data: bytes, name: str, least: Least = None) -> np.ndarray:
    """`picture` as [h, w, 3] uint8."""
    return np.asarray(picture(data, name, least))


def decode_mask(data: bytes, name: str, least: Least = None) -> np.ndarray:
    """`grey` as [h, w] uint8."""
    return np.asarray(grey(data, name, least))


def picture(data: bytes, name: str, least: Least = None) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency on white; of an animation the first frame.

    Args:
      data: the encoded picture.
      name: for messages.
      least: height and width, upright: a JPEG may come at 1/2, 1/4 or 1/8 as long as both sides stay at least that. Or
        a function that makes it of the size that `size` tells.

    Raises:
      UserError: no picture, too large, or damaged.
    """
    return _in_mode("RGB", "white", data, name, least)


def grey(data: bytes, name: str, least: Least = None) -> Image.Image:
    """A mask as L, upright, as stored (not binarised); what is transparent is black.

    Arguments and errors are `picture`'s.
    """
    return _in_mode("L", "black", data, name, least)


def whole(data: bytes | BinaryIO, name: str) -> tuple[int, int]:
    """Look at the header and the end of a file; formats without a mark at their end are decoded.

    Returns:
      `size`.

    Raises:
      UserError: no picture, too large, or a file that ends too early.
    """
    file = _file(data)
    image = _open(file, name)
    shape = _upright_size(image, file)
    ends = {"JPEG": _jpeg_ends, "PNG": _png_ends, "TIFF": _tiff_ends, "WEBP": _webp_ends}.get(image.format)
    if ends is None:
        _decoded(image, name)
    elif not ends(file, image):
        raise UserError(f"picture {name}: found a {image.format} file that ends too early; expected a whole one")
    return shape


def check_mask(mask: Size, picture: Size, name: str) -> None:
    """Raises UserError where a mask is of another size than its picture: stretched, it would hide other things."""
    if tuple(mask) != tuple(picture):
        raise UserError(f"mask {name} is {mask[1]} x {mask[0]} pixels (width x height); its picture is {picture[1]} x "
                        f"{picture[0]}")


def _file(data: bytes | BinaryIO) -> BinaryIO:
    return io.BytesIO(data) if isinstance(data, bytes | bytearray | memoryview) else data


def _open(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    """The header read, nothing decoded; never more than MOST_PIXELS."""
    file.seek(0)
    start = file.read(32)
    plugin = _plugin(start)
    if plugin is None:
        raise UserError(f"picture {name}: found {_kind(start)}; expected {EXPECTED}")
    if plugin is WebPImagePlugin.WebPImageFile and not _webp_ends(file):  # Pillow's message would be another
        raise UserError(f"picture {name}: found a WEBP file that ends too early; expected a whole one")
    file.seek(0)
    try:
        image = plugin(file)  # not Image.open: that warns of large pictures on its own account
        height, width = _stored_size(image)
    except Exception as error:  # whatever Pillow stumbles over in a damaged file
        raise UserError(f"picture {name}: found a damaged {plugin.format} header ({_said(error)}); expected a whole "
                        "file") from error
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise UserError(f"picture {name}: found {width} x {height} pixels (width x height); expected at least 1 x 1 "
                        f"and at most {MOST_PIXELS / 1e6:.0f} megapixels")
    return image


def _plugin(start: bytes) -> type[ImageFile.ImageFile] | None:
    """Pillow's reader by a file's first bytes, whatever its name ends in."""
    if start[:3] == b"\xff\xd8\xff":
        return JpegImagePlugin.JpegImageFile
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return PngImagePlugin.PngImageFile
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if start[4:12] in (b"ftypavif", b"ftypavis"):
        return AvifImageFile
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return GifImagePlugin.GifImageFile
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffImagePlugin.TiffImageFile
    if start[:2] == b"BM":
        return BmpImagePlugin.BmpImageFile
    if start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace():
        return PpmImagePlugin.PpmImageFile
    if start[:4] == b"\xff\x4f\xff\x51" or start[:12] == b"\0\0\0\x0cjP  \r\n\x87\n":
        return Jpeg2KImagePlugin.Jpeg2KImageFile
    return None


def _kind(start: bytes) -> str:
    """What a file is that is no picture, by its first bytes."""
    if not start:
        return "an empty file"
    if start[4:8] == b"ftyp":
        return "an HEIC picture" if start[8:11] in (b"hei", b"hev", b"mif", b"msf") else "a video"
    if not any(start):
        return "zeros, as a download leaves them that did not end"
    return next((kind for begin, kind in _OTHERS if start.lstrip()[:len(begin)].lower() == begin.lower()),
                f"no picture ({ascii(start[:12])[1:]} ...)")


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Height and width before the picture is turned upright."""
    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    return int(height), int(width)


def _upright_size(image: ImageFile.ImageFile, file: BinaryIO) -> tuple[int, int]:
    height, width = _stored_size(image)
    return (width, height) if _orientation(image, file) >= 5 else (height, width)


def _orientation(image: ImageFile.ImageFile, file: BinaryIO) -> int:
    """EXIF's orientation 1 .. 8; 1 where there is none or it makes no sense."""
    try:
        if image.format == "PNG" and "exif" not in image.info:  # it may stand behind the pixels
            at = file.tell()
            for kind, start, length in _png_chunks(file):
                if kind == b"eXIf":
                    file.seek(start)
                    image.info["exif"] = b"Exif\0\0" + file.read(min(length, 1 << 20))
                    break
            file.seek(at)
        exif = Image.Image.getexif(image)  # PNG's own would decode the picture
        turn = exif.get(_ORIENTATION, 1)
        return turn if turn in _TURNS else 1
    except Exception:  # damaged EXIF is no reason to refuse the pixels
        return 1


def _in_mode(mode: str, ground: str, data: bytes, name: str, least: Least) -> Image.Image:
    image, turn = _load(data, name, least)
    try:
        if image.has_transparency_data:
            image = _on(image, ground)
        image = image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise UserError(f"picture {name}: found the colour mode {image.mode}; expected RGB, grey, CMYK or a palette"
                        ) from error
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


def _load(data: bytes, name: str, least: Least) -> tuple[Image.Image, int]:
    """The picture in 8 bits a channel and its orientation, not yet applied."""
    file = _file(data)
    image = _open(file, name)
    turn = _orientation(image, file)
    if least is not None and image.format == "JPEG":
        if callable(least):
            height, width = _stored_size(image)
            least = least((width, height) if turn >= 5 else (height, width))
        height, width = least[::-1] if turn >= 5 else least
        image.draft(None, (max(int(width), 1), max(int(height), 1)))
    return _eight_bits(_decoded(image, name), name), 1 if image.format == "TIFF" else turn  # Pillow turns TIFF itself


def _decoded(image: ImageFile.ImageFile, name: str) -> Image.Image:
    try:
        image.load()
    except MemoryError as error:
        raise UserError(f"picture {name}: {image.size[0]} x {image.size[1]} pixels do not fit in memory") from error
    except Exception as error:  # whatever Pillow stumbles over in a damaged file
        raise UserError(f"picture {name}: found a damaged {image.format} file ({_said(error)}); expected a whole one"
                        ) from error
    return image


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit and float grey as L, or LA where a value is transparent; other modes have 8 bits already."""
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PPM", "PNG"):
        stored = np.asarray(image)
        grey = Image.fromarray((stored >> 8).astype(np.uint8))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            return Image.merge("LA", (grey, Image.fromarray(np.where(stored == clear, 0, 255).astype(np.uint8))))
        return grey
    if image.mode == "F":
        stored = np.asarray(image)
        least, most = float(stored.min()), float(stored.max())
        if not 0 <= least <= most <= 255:  # NaN fails, too
            raise UserError(f"picture {name}: found floating point values from {least:g} to {most:g}; expected 0 to 1 "
                            "or 0 to 255")
        return Image.fromarray(np.rint(stored * (255 if most <= 1 else 1)).astype(np.uint8))
    if image.mode == "I":
        raise UserError(f"picture {name}: found 32-bit integers; expected 8 or 16 bits a channel")
    return image


def _on(image: Image.Image, ground: str) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image)


def _length(file: BinaryIO) -> int:
    return file.seek(0, io.SEEK_END)


def _jpeg_ends(file: BinaryIO, image: Image.Image) -> bool:
    """Whether the end marker stands behind the first scan's start: pixels never contain it (thumbnails do).

    What follows it is let be: phones append videos.
    """
    start, length = _jpeg_scan(file), _length(file)
    if start is None:
        return False
    for at in (max(start, length - (1 << 16)), start):  # at the end first, then everywhere
        file.seek(at)
        last = b""
        while block := file.read(1 << 20):
            if b"\xff\xd9" in last + block:
                return True
            last = block[-1:]
    return False


def _jpeg_scan(file: BinaryIO) -> int | None:
    """Where the first scan's pixels start."""
    file.seek(2)
    while (mark := file.read(1)) and mark == b"\xff":
        while (kind := file.read(1)) == b"\xff":  # fill bytes
            pass
        length = int.from_bytes(file.read(2))
        if length < 2:
            return None
        at = file.seek(length - 2, io.SEEK_CUR)
        if kind == b"\xda":
            return at
    return None


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its data starts, bytes of data) of each chunk that the file holds whole."""
    length, at = _length(file), 8
    while at + 12 <= length:
        file.seek(at)
        header = file.read(8)
        size = int.from_bytes(header[:4])
        if at + 12 + size > length:
            return
        yield header[4:], at + 8, size
        at += 12 + size


def _png_ends(file: BinaryIO, image: Image.Image) -> bool:
    return any(kind == b"IEND" for kind, _, _ in _png_chunks(file))


def _tiff_ends(file: BinaryIO, image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether every strip or tile of the first page is inside the file."""
    length = _length(file)
    for offsets, counts in ((273, 279), (324, 325)):
        found = zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(counts, ()), strict=False)
        if any(at + count > length for at, count in found):
            return False
    return True


def _webp_ends(file: BinaryIO, image: Image.Image | None = None) -> bool:
    file.seek(4)
    return 8 + int.from_bytes(file.read(4), "little") <= _length(file)


def _said(error: Exception) -> str:
    """An error of Pillow's or the system's on one line of bounded length."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return " ".join(ascii(text)[1:-1].replace("\\n", " ").split())[:150]
