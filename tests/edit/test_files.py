import numpy as np
import pytest
from PIL import Image, ImageCms

from acejax import UserError
from acejax.edit.files import colors, read_mask, read_picture, write_picture


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "LA"])
def test_every_kind_of_picture_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    grey = 255 if mode == "1" else 200
    Image.new("L", (30, 20), grey).convert(mode).save(path) if mode != "I;16" else Image.fromarray(
        np.full((20, 30), 200 * 257, np.uint16)).save(path)
    picture = read_picture(path)
    assert picture.shape == (20, 30, 3) and np.abs(picture.astype(int) - grey).max() <= 1


def test_transparency_is_laid_on_white_and_exif_turns_the_picture(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png").min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (40, 20, 3)


def test_mistakes_name_the_file(tmp_path):
    (tmp_path / "no.png").write_text("not a picture")
    Image.new("L", (30, 20), 0).save(tmp_path / "black.png")
    whole = (tmp_path / "black.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3)).astype(np.uint8)).save(tmp_path / "full.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "full.png").read_bytes()[:5000])
    for name, message in (("nosuch.png", "no such file"), ("no.png", "found no picture"), ("half.png", "damaged PNG"),
                          ("", "found a folder")):
        with pytest.raises(UserError, match=message):
            read_picture(tmp_path / name)
    with pytest.raises(UserError, match=r"black.png is 30 x 20 pixels \(width x height\); its picture is 21 x 20"):
        read_mask(tmp_path / "black.png", (20, 21))
    with pytest.raises(UserError, match="no white pixel"):
        read_mask(tmp_path / "black.png", (20, 30))
    with pytest.raises(UserError, match="names no picture format"):
        write_picture(tmp_path / "a.txt", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(UserError, match="is not there"):
        write_picture(tmp_path / "no" / "a.png", np.zeros((2, 2, 3), np.uint8))
    assert (tmp_path / "black.png").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["black.png", "full.png", "half.png", "no.png"]


def test_what_is_written_is_read(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    write_picture(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_colour_profiles_are_kept(tmp_path):
    profile, picture = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), np.zeros((9, 7, 3), np.uint8)
    assert colors(None) is None
    for suffix in ("png", "jpg", "webp"):
        write_picture(tmp_path / f"a.{suffix}", picture, colors=profile)
        assert colors(tmp_path / f"a.{suffix}") == profile
        Image.fromarray(picture[..., 0]).save(tmp_path / f"grey.{suffix}", icc_profile=b"x" * 16 + b"GRAY" + b"x" * 200)
        assert colors(tmp_path / f"grey.{suffix}") is None, "for other numbers than are written"


def test_what_a_format_cannot_hold_is_told(tmp_path):
    with pytest.raises(UserError, match=r"a.webp: the result is 16384 x 1 pixels .* WEBP holds at most 16,383 a side"):
        write_picture(tmp_path / "a.webp", np.zeros((1, 16_384, 3), np.uint8))
    write_picture(tmp_path / "b.webp", np.zeros((1, 16_383, 3), np.uint8))
    write_picture(tmp_path / "b.jpg", np.zeros((1, 65_500, 3), np.uint8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jpg", "b.webp"]
