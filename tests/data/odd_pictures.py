"""Picture files of every odd kind, each with what must become of it, stated without acejax's own code.

A kind takes a random generator and gives (bytes, wanted): an array [h, w, 3] uint8 where pixels must come out, REFUSED
where decoding must end in a message, CUT where `whole` must (decoding may still find pixels), or ANY.
"""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, features

REFUSED, CUT, ANY = "refused", "cut", "any"
LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}}
if "avif" in features.modules and features.check("avif"):  # Pillow from 11.3 on
    LOSSY["AVIF"] = {"quality": 95, "speed": 10, "subsampling": "4:4:4"}
EXACT = {"PNG": {}, "WEBP": {"lossless": True, "method": 0}, "TIFF": {}, "BMP": {}, "PPM": {},
         "JPEG2000": {"irreversible": False}}
Wanted = np.ndarray | str


def picture(rng: np.random.Generator, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Blocks of colour, so that a lossy format keeps them."""
    height, width = (int(rng.integers(1, 90)) if side is None else side for side in (height, width))
    small = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
    return np.kron(small, np.ones((16, 16, 1), np.uint8))[:height, :width]


def encoded(array: np.ndarray, format: str, **options) -> bytes:
    return saved(Image.fromarray(array), format, **LOSSY.get(format, EXACT.get(format, {})) | options)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG by hand: `rows` are the scan lines, each after its filter byte."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def of(rng: np.random.Generator, *values):
    return values[rng.integers(len(values))]


def plain(rng):
    array = picture(rng)
    return encoded(array, of(rng, *LOSSY, *EXACT)), array


def one_pixel(rng):
    array = picture(rng, *of(rng, (1, None), (None, 1), (1, 1)))
    return encoded(array, of(rng, "JPEG", "PNG", "WEBP", "TIFF")), array


def grey_16(rng):
    wide = rng.integers(0, 65536, (int(rng.integers(1, 40)), int(rng.integers(1, 40)))).astype(np.uint16)
    wanted = np.repeat((wide // 256).astype(np.uint8)[..., None], 3, -1)
    if of(rng, True, False):
        return saved(Image.fromarray(wide), of(rng, "PNG", "TIFF")), wanted
    height, width = wide.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    clear = int(wide[0, 0])  # one value transparent: white
    return (png(height, width, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", clear))),
            np.where((wide == clear)[..., None], 255, wanted).astype(np.uint8))


def colour_16(rng):
    wide = rng.integers(0, 65536, (int(rng.integers(1, 40)), int(rng.integers(1, 40)), 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    return png(*wide.shape[:2], 16, 2, rows), (wide // 256).astype(np.uint8)


def floating(rng):
    grey = rng.integers(0, 256, (9, 7)).astype(np.float32)
    grey[0, 0] = 255
    wanted = np.repeat(grey.astype(np.uint8)[..., None], 3, -1)
    scale, wanted = of(rng, (1, wanted), (1 / 255, wanted), (-1, REFUSED), (np.nan, REFUSED), (100, REFUSED))
    return saved(Image.fromarray((grey * scale).astype(np.float32)), "TIFF"), wanted


def integers_32(rng):
    return saved(Image.fromarray(rng.integers(0, 2**31, (9, 7)).astype(np.int32)), "TIFF"), REFUSED


def cmyk(rng):
    """As Adobe writes it; black ink stays 0, so that red is what cyan leaves."""
    array = picture(rng)
    return saved(Image.fromarray(array).convert("CMYK"), "JPEG", quality=95, subsampling=0), array


def palette(rng):
    colours = rng.integers(0, 256, (5, 3)).astype(np.uint8)
    index = rng.integers(0, 5, (int(rng.integers(1, 40)), int(rng.integers(1, 40)))).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    wanted = colours[index]
    if of(rng, True, False):  # one index is transparent
        image.info["transparency"] = 2
        wanted = np.where((index == 2)[..., None], 255, wanted).astype(np.uint8)
    options = {"transparency": 2} if "transparency" in image.info else {}
    return saved(image, of(rng, "PNG", "GIF"), **options), wanted


def alpha(rng):
    array = picture(rng)
    cover = rng.integers(0, 256, array.shape[:2]).astype(np.uint8)
    share = cover[..., None] / 255
    if of(rng, True, False):
        image, array = Image.fromarray(np.dstack([array[..., 0], cover])), np.repeat(array[..., :1], 3, -1)
    else:
        image = Image.fromarray(np.dstack([array, cover]))
    data = saved(image, "PNG") if image.mode == "LA" else saved(image, of(rng, "PNG", "TIFF"))
    return data, np.rint(array * share + 255 * (1 - share)).astype(np.uint8)


def bilevel(rng):
    black = rng.integers(0, 2, (11, 13)).astype(bool)
    return (saved(Image.fromarray(black), of(rng, "PNG", "TIFF", "BMP")),
            np.repeat(np.where(black, 255, 0).astype(np.uint8)[..., None], 3, -1))


def turned(rng, formats=("JPEG", "PNG", "TIFF", "WEBP")):
    """EXIF says where the stored first row and first column belong in the picture."""
    upright = picture(rng)
    turn = int(rng.integers(2, 9))
    row, column = {2: "top right", 3: "bottom right", 4: "bottom left", 5: "left top", 6: "right top",
                   7: "right bottom", 8: "left bottom"}[turn].split()
    stored = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = turn
    format = of(rng, *formats)
    data = encoded(np.ascontiguousarray(stored), format, exif=exif)
    if format == "PNG" and of(rng, True, False):  # behind the pixels, where some programs put it
        at = data.index(b"eXIf") - 4
        piece = data[at:at + 12 + struct.unpack(">I", data[at:at + 4])[0]]
        data = data.replace(piece, b"")[:-12] + piece + data[-12:]
    return data, upright


def strange_exif(rng):
    array = picture(rng)
    exif = Image.Exif()
    exif[0x0112] = of(rng, 0, 9, 77)
    data = encoded(array, of(rng, "JPEG", "PNG"), exif=exif)
    at = data.index(b"II*\0" if b"II*\0" in data else b"MM\0*")
    if data[:2] == b"\xff\xd8" and of(rng, True, False):  # garbage where the tags are
        data = data[:at + 8] + rng.bytes(8) + data[at + 16:]
    return data, array


def animated(rng):
    frames = [picture(rng, 30, 40) for _ in range(3)]
    rest = [Image.fromarray(frame) for frame in frames[1:]]
    format = of(rng, "WEBP", "PNG")
    return encoded(frames[0], format, save_all=True, append_images=rest), frames[0]


def truncated(rng):
    data = encoded(picture(rng), of(rng, *LOSSY, *EXACT), **{})
    return data[:rng.integers(len(data))], CUT


def truncated_with_thumbnail(rng):
    """The header holds a whole small JPEG with an end marker of its own."""
    exif = Image.Exif()
    exif[0x927C] = encoded(picture(rng, 30, 30), "JPEG")
    data = encoded(rng.integers(0, 256, (60, 60, 3)).astype(np.uint8), "JPEG", exif=exif)
    return data[:-int(rng.integers(2, 4000))], CUT


def zero_filled(rng):
    data = encoded(rng.integers(0, 256, (60, 60, 3)).astype(np.uint8), of(rng, "JPEG", "PNG"))
    keep = int(rng.integers(len(data) - 20))
    return data[:keep] + bytes(len(data) - keep), CUT


def longer(rng):
    array = picture(rng)
    return encoded(array, of(rng, "JPEG", "PNG", "WEBP")) + of(rng, rng.bytes(100_000), bytes(3), b"\n"), array


def bomb(rng):
    """The header says 200 to 4,000 megapixels; few bytes follow."""
    height, width = (int(side) for side in rng.integers(14_200, 65_000, 2))
    data = encoded(picture(rng, 8, 8), of(rng, "PNG", "JPEG", "GIF", "BMP", "WEBP"))
    if data[:4] == b"\x89PNG":
        return png(height, width, 8, 2, bytes(1000)), REFUSED
    if data[:2] == b"\xff\xd8":
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4:], REFUSED
    if data[:3] == b"GIF":
        return data[:6] + struct.pack("<HH", width, height) + data[10:], REFUSED
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<ii", width, height) + data[26:], REFUSED
    sides = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    body = b"VP8X" + struct.pack("<II", 10, 0) + sides + data[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body, REFUSED


def no_size(rng):
    return png(*of(rng, (0, 5), (5, 0), (0, 0)), 8, 2, bytes(100)), REFUSED


def no_picture(rng):
    return of(rng, b"", b"not a picture", bytes(5000), rng.bytes(3000), b"<!DOCTYPE html><html>404</html>",
              b"\0\0\0\x18ftypheic" + rng.bytes(100), b"%PDF-1.7 ...", b"PK\3\4" + rng.bytes(100), b"\xff\xd8\xff",
              b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2380\n", b"\x89PNG\r\n\x1a\n",
              b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
              ), REFUSED


def flipped(rng):
    data = bytearray(encoded(picture(rng), of(rng, *LOSSY, *EXACT)))
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(of(rng, len(data), min(len(data), 200)))] = rng.integers(256)
    return bytes(data), ANY


def spliced(rng):
    one, other = (encoded(picture(rng), of(rng, *LOSSY, *EXACT)) for _ in range(2))
    return one[:rng.integers(len(one))] + other[rng.integers(len(other)):], ANY


Kind = Callable[[np.random.Generator], tuple[bytes, Wanted]]
KINDS: tuple[Kind, ...] = (
    plain, one_pixel, grey_16, colour_16, floating, integers_32, cmyk, palette, alpha, bilevel, turned, strange_exif,
    animated, truncated, truncated_with_thumbnail, zero_filled, longer, bomb, no_size, no_picture, flipped, flipped,
    flipped, spliced, truncated)
