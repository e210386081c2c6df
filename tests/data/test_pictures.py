"""Pictures of every kind come out right, or end in one message."""

import inspect
import io
import resource
import time
import warnings

import numpy as np
import pytest
from PIL import Image

import acejax
from acejax.data import pictures
from tests.counts import count
from tests.data import odd_pictures as odd


def decode(data: bytes, **least) -> np.ndarray:
    return pictures.decode(data, "odd.png", **least)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
def test_odd_pictures():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {}
    for case in range(count(500, 4000)):
        kind = odd.KINDS[case % len(odd.KINDS)]
        data, wanted = kind(np.random.default_rng(case))
        started = time.monotonic()
        results = [attempt(function, data) for function in (pictures.size, pictures.whole, pictures.decode)]
        size, whole, decoded = results
        assert time.monotonic() - started < 30
        where = kind.__name__, case, results
        if isinstance(decoded, np.ndarray):
            assert size == decoded.shape[:2] and decoded.dtype == np.uint8 and decoded.shape[2] == 3, where
        if isinstance(wanted, np.ndarray):
            assert size == whole == wanted.shape[:2], where
            far = np.abs(decoded.astype(int) - wanted)
            lossy = data[:2] == b"\xff\xd8" or data[4:8] == b"ftyp"
            assert far.mean() < 5 if lossy else far.max() <= 1, where
        elif wanted == odd.REFUSED:
            assert isinstance(decoded, str), where
        elif wanted == odd.CUT:
            assert isinstance(whole, str), where
        outcomes.setdefault(kind.__name__, set()).add(type(decoded).__name__)
    assert outcomes["flipped"] == outcomes["spliced"] == {"ndarray", "str"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def attempt(function, data: bytes):
    """What comes out, or the one line that says why nothing does."""
    try:
        return function(data, "odd.png")
    except acejax.UserError as error:
        assert str(error).startswith("picture odd.png: ") and "\n" not in str(error) and len(str(error)) < 400
        assert str(error).isprintable()
        return str(error)


@pytest.mark.parametrize("kind", [b"JPEG", b"PNG"])
def test_the_header_suffices(kind):
    """Size from the first bytes of a file that is not there otherwise; nothing is read behind the header."""
    data = odd.encoded(odd.picture(np.random.default_rng(0), 300, 500), kind.decode())
    assert pictures.size(data[:700], "a") == (300, 500)
    with pytest.raises(acejax.UserError, match="ends too early"):
        pictures.whole(data[:-1], "a")


@pytest.mark.parametrize("turn", [None, 6, 3])
@pytest.mark.parametrize("size", [(800, 560), (801, 563), (170, 900)])
def test_a_jpeg_is_decoded_small_but_never_smaller_than_asked(turn, size):
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    smooth = np.add.outer(np.linspace(0, 200, size[0]), np.linspace(0, 55, size[1]))[..., None]
    data = odd.encoded(smooth.astype(np.uint8).repeat(3, -1), "JPEG", exif=exif)
    full = decode(data)
    assert full.shape[:2] == pictures.size(data, "a") == (size[::-1] if turn == 6 else size)
    for least in ((1, 1), (50, 40), (100, 70), (101, 70), (400, 281), (1000, 1000)):
        small = decode(data, least=least)
        scale = max(step for step in (1, 2, 4, 8) if step == 1 or all(
            full.shape[axis] // least[axis] >= step for axis in (0, 1)))
        assert small.shape[:2] == tuple(-(-side // scale) for side in full.shape[:2]), least
        step = full.shape[0] / small.shape[0]
        rows = np.minimum((np.arange(small.shape[0]) * step + step / 2).astype(int), full.shape[0] - 1)
        assert np.abs(small[:, 0].astype(int) - full[rows, 0]).mean() < 6


def test_masks_keep_their_greys_and_take_what_is_transparent_for_black():
    grey = np.arange(0, 256, dtype=np.uint8).reshape(8, 32)
    for data in (odd.encoded(grey, "PNG"), odd.encoded(grey.repeat(3).reshape(8, 32, 3), "PNG"),
                 odd.saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")):
        np.testing.assert_array_equal(pictures.decode_mask(data, "m"), grey)
    clear = np.dstack([np.full((2, 2), 255, np.uint8), np.array([[0, 255], [128, 0]], np.uint8)])
    np.testing.assert_array_equal(pictures.decode_mask(odd.saved(Image.fromarray(clear), "PNG"), "m"),
                                  [[0, 255], [128, 0]])
    data, upright = odd.turned(np.random.default_rng(3), formats=("PNG",))
    assert pictures.decode_mask(data, "m").shape == upright.shape[:2]


def test_large_pictures_are_judged_by_their_header():
    """108 megapixels pass without Pillow's warning, 400 do not; Pillow's own limit is left alone."""
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.size(odd.png(9000, 12000, 8, 0, bytes(9)), "a") == (9000, 12000)
        with pytest.raises(acejax.UserError, match="20000 x 20000 pixels .* at most 179 megapixels"):
            pictures.size(odd.png(20000, 20000, 8, 0, bytes(9)), "a")


@pytest.mark.soak  # seconds, and 1 GB of memory
def test_a_hundred_megapixels():
    flat = odd.png(10_000, 10_000, 8, 0, bytes(10_000 * 10_001))
    assert len(flat) < 200_000 and decode(flat).shape == (10_000, 10_000, 3)
    jpeg = odd.saved(Image.new("RGB", (10_000, 10_000), (9, 99, 200)), "JPEG")
    assert decode(jpeg, least=(1000, 1000)).shape == (1250, 1250, 3)
    assert np.abs(decode(jpeg)[5000, 5000].astype(int) - (9, 99, 200)).max() <= 3


def test_files(tmp_path):
    array = odd.picture(np.random.default_rng(0), 30, 40)
    (tmp_path / "a.png").write_bytes(odd.encoded(array, "JPEG"))  # the name says otherwise
    with pictures.opened(tmp_path / "a.png") as file:
        assert pictures.whole(file, "a") == (30, 40)
    assert decode(pictures.read(tmp_path / "a.png")).shape == (30, 40, 3)
    for path, message in ((tmp_path / "no.png", "no such file"), (tmp_path, "found a folder"),
                          (tmp_path / "a.png" / "b.png", "no such file"), ("a\0b", "cannot be read"),
                          (tmp_path / ("x" * 300), "cannot be read")):
        with pytest.raises(acejax.UserError, match=message):
            pictures.read(path)


def test_nothing_is_opened_by_guessing():
    """No plugin but the named ones: some of Pillow's start programs."""
    assert "Image.open" not in inspect.getsource(pictures).replace("not Image.open", "")
    data = io.BytesIO()
    Image.new("RGB", (9, 9)).save(data, "EPS")
    with pytest.raises(acejax.UserError, match="found no picture"):
        decode(data.getvalue())
