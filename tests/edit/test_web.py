"""The page without a browser: the form, the canvas, and the running page through its own client."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from acejax.data.layout import CanvasConfig
from acejax.demo.tasks import TASKS
from acejax.edit import record, web_mask
from acejax.edit.profile import Profile
from acejax.edit.request import Options, Result
from acejax.edit.web_form import Form, Limits, preview, read, takes
from acejax.errors import UserError

PROFILE = Profile("small weights", TASKS, CanvasConfig(editing_height=1.0), 8, None, 64)
LIMITS = Limits(megabytes=1, megapixels=1, references=2)
SQUARE = np.zeros((50, 100), np.uint8)
SQUARE[10:20, 30:50] = 255


class FakeEditor:
    """Inverts the picture: what the page does with an edit needs no model."""

    profile = PROFILE

    def edit(self, requests, options=Options(), say=None):
        request = requests[0]
        if request.prompt == "unknown <word>":
            raise UserError("the prompt has an unknown <word>")
        say("inverting", 0.5)
        picture = np.zeros((64, 64, 3), np.uint8) if request.image is None else 255 - request.image
        return [Result(picture, request.task or "insert", request.prompt, None, None, 16)]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)).save(path)
    return str(path)


def test_the_painted_area_becomes_the_mask_of_the_pictures_own_size(photo):
    asked = read(PROFILE, Form("a red heart", "insert", photo, SQUARE), LIMITS)
    assert asked.painted and asked.request.mask.shape == (100, 200)
    np.testing.assert_array_equal(asked.request.mask, np.kron(SQUARE, np.ones((2, 2), np.uint8)))


def test_what_the_task_takes_none_of_is_left_out(photo):
    asked = read(PROFILE, Form("a star", "text", photo, SQUARE, references=(photo,)), LIMITS)
    assert asked.request.image is asked.request.mask is None and not asked.request.references


@pytest.mark.parametrize("more, message", [
    ({"references": ("photo",) * 3}, "at most 2"), ({"seed": -1}, "seed is -1"), ({"grow": -1}, "grow is -1"),
    ({"width": 64}, "both a width"), ({"width": 5000, "height": 5000}, "at most 1 megapixels"),
    ({"picture": "gone.png"}, "upload it again"),
    ({"picture": "text.png"}, "expected a JPEG, PNG"), ({"picture": "large.png"}, "at most 1 megapixels"),
    ({"mask": "other.png"}, "mask other.png is 20 x 20")])
def test_mistakes_are_told_without_the_servers_folders(photo, more, message, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (2000, 1000)).save(tmp_path / "large.png")
    Image.new("L", (20, 20)).save(tmp_path / "other.png")
    place = {name: str(tmp_path / name) for name in ("gone.png", "text.png", "large.png", "other.png")}
    place["photo"] = photo
    more = {name: tuple(place[one] for one in value) if isinstance(value, tuple) else place.get(value, value)
            for name, value in more.items()}
    form = Form(**({"picture": photo} | more))
    with pytest.raises(UserError, match=message) as told:
        read(PROFILE, form, LIMITS)
    assert str(tmp_path) not in str(told.value)


def test_the_canvas_gives_back_what_is_painted():
    shown = web_mask.painted(np.zeros((50, 100, 3), np.uint8), SQUARE)
    np.testing.assert_array_equal(web_mask.read(shown), SQUARE)
    assert web_mask.read(web_mask.painted(np.zeros((50, 100, 3), np.uint8))) is None is web_mask.read("")


@pytest.mark.parametrize("value", ["{", "[]", "{}", web_mask.URL + "AAAA", web_mask.URL + "?", "data:image/gif;base64,",
                                   '{"mask": 3}', "x" * 5_000_000, web_mask._url(np.zeros((2, 5000, 3), np.uint8))])
def test_a_canvas_that_was_tampered_with_is_refused(value):
    with pytest.raises(UserError, match="what is painted"):
        web_mask.read(value)


def test_preview_and_task_lines(photo):
    assert preview(photo, 640, LIMITS).shape == (320, 640, 3)
    assert takes(TASKS["two_references"]).endswith("**Takes** a picture, a mask, 2 references.")
    assert takes(TASKS["text"]).endswith("**Takes** words alone.")


def test_the_page_edits_records_and_refuses(photo, tmp_path):
    pytest.importorskip("gradio", reason="the page needs the extra `web`")
    import httpx
    from gradio_client import Client, handle_file

    from acejax.edit.web import Site, serving

    with serving(Site(FakeEditor(), limits=LIMITS), port=0) as address:
        client = Client(address, verbose=False, download_files=str(tmp_path))

        def edit(prompt, canvas):
            return client.predict("insert", prompt, handle_file(photo), canvas, None, [], 7, None, None, None, None,
                                  None, 3, api_name="/edit")

        made, _, mask, text = edit("a red heart", web_mask.painted(np.zeros((50, 100, 3), np.uint8), SQUARE))
        np.testing.assert_array_equal(np.asarray(Image.open(made)), 255 - np.asarray(Image.open(photo)))
        about = record.read(made)
        assert (about.task, about.seed, about.steps, about.grow) == ("insert", 7, 8, 3)
        assert {file.field: file.path for file in about.files} == {"image": "./photo.png",
                                                                   "mask": f"./{pathlib.Path(mask['value']).name}"}
        assert "seed 7" in text and mask["visible"]
        with pytest.raises(Exception, match="unknown &lt;word&gt;"):  # the page shows messages as HTML
            edit("unknown <word>", "")
        large = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"0" * 1_100_000)})
        much = httpx.post(f"{address}gradio_api/upload", content=b"0" * 4_000_000)
        assert large.status_code == 413 and much.status_code == 413
        folder = pathlib.Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.exists()
    assert not folder.exists()
