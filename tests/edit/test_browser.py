"""The page with the small weights in headless Chromium, as a visitor uses it."""

import shutil

import numpy as np
import pytest
from PIL import Image

from acejax.edit import record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 240_000  # milliseconds: the first edit compiles
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install "
                                                   "chromium")]


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio", reason="the page needs the extra `web`")
    from acejax.demo import examples
    from acejax.demo.weights import load_editor
    from acejax.edit.web import Site, serving
    from acejax.edit.web_form import Limits

    with serving(Site(load_editor(), examples.ABOUT, examples.examples(), Limits(megabytes=1)), port=0) as where:
        yield where


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the page is driven with playwright")
    how = {"executable_path": CHROMIUM, "args": ["--no-sandbox", "--disable-gpu"]}  # Debian's; root has no sandbox
    with api.sync_playwright() as playwright, playwright.chromium.launch(**how) as started:
        yield started


@pytest.fixture
def visit(browser, address):
    """Opens the page as another user; at the end nothing was asked of another machine, and no script failed."""
    opened, elsewhere, failed = [], [], []

    def visited():
        page = browser.new_context(viewport={"width": 1280, "height": 1150}).new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda one: elsewhere.append(one.url) if not one.url.startswith(
            (address, "data:", "blob:")) else None)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#run")
        opened.append(page)
        return page

    yield visited
    for page in opened:
        page.context.close()
    assert not elsewhere and not failed


@pytest.fixture
def photo(tmp_path):
    """160 x 240 pixels of smooth colours."""
    rows, columns = np.mgrid[:160, :240]
    path = tmp_path / "photo.png"
    Image.fromarray(np.stack([rows, columns, 200 - rows], -1).astype(np.uint8)).save(path)
    return path


def upload(page, path):
    page.locator("#picture input[type=file]").set_input_files(str(path))
    page.wait_for_selector("#canvas .paper:not(.empty)")


def scribble(page):
    """Paint the middle of the canvas."""
    box = page.locator("#canvas canvas").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 30, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 20, steps=4)
    page.mouse.up()


def said(page, words):
    """Wait for words in a message of the page."""
    page.locator(".toast-body", has_text=words).wait_for()


def test_upload_paint_run_download(visit, photo, tmp_path):
    page = visit()
    upload(page, photo)
    scribble(page)
    page.locator("#prompt textarea").fill("a red heart")
    page.locator("#run").click()
    page.wait_for_selector("#result img")
    with page.expect_download() as told:
        page.locator("#download").click()
    told.value.save_as(tmp_path / "out.png")
    with page.expect_download() as told:
        page.locator("#download-mask").click()
    told.value.save_as(tmp_path / "mask.png")
    before, after, mask = (np.asarray(Image.open(tmp_path / name)) for name in ("photo.png", "out.png", "mask.png"))
    assert after.shape == before.shape and mask.shape == before.shape[:2]
    rows, columns = np.nonzero(mask)
    assert abs(rows.mean() - 80) < 12 and abs(columns.mean() - 120) < 12  # where it was painted
    changed = (before != after).any(-1)
    assert changed[mask > 127].mean() > 0.2 and not changed[mask <= 127].any()  # a heart fills a part of it
    assert record.read(tmp_path / "out.png").prompt == "a red heart"


def test_wrong_files_and_words_are_told(visit, tmp_path):
    page = visit()
    (tmp_path / "words.png").write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(str(tmp_path / "words.png"))
    said(page, "expected a JPEG, PNG")
    page = visit()
    (tmp_path / "words.txt").write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(str(tmp_path / "words.txt"))
    said(page, "nvalid file type")
    page = visit()
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(1_200_000))
    page.locator("#picture input[type=file]").set_input_files(str(tmp_path / "large.png"))
    said(page, "exceed the maximum allowed size")
    page.locator("#prompt textarea").fill("a red <b>dog</b>")
    page.locator("#run").click()
    said(page, "do not know '<b>dog</b>'")


def test_two_users_at_once_take_turns_and_get_their_own(visit, tmp_path):
    pages = visit(), visit()
    for page, prompt in zip(pages, ("a yellow star on grass", "a red circle on sky"), strict=True):
        page.locator("#prompt textarea").fill(prompt)
    for page in pages:
        page.locator("#run").click()
    for page, prompt in zip(pages, ("a yellow star on grass", "a red circle on sky"), strict=True):
        page.locator("#facts", has_text=prompt).wait_for()
        with page.expect_download() as told:
            page.locator("#download").click()
        told.value.save_as(tmp_path / "out.png")
        assert record.read(tmp_path / "out.png").prompt == prompt


def test_examples_fill_the_form(visit):
    page = visit()
    page.locator(".example", has_text="recolor").click()
    page.wait_for_selector("#canvas .paper:not(.empty)")
    page.locator("#takes", has_text="another colour").wait_for()
    page.locator("#run").click()
    page.wait_for_selector("#result img")
