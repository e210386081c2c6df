"""What a PNG keeps of an edit, and how it is held against what is there now."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import acejax
from acejax import MMDiTConfig, UserError
from acejax.edit import files, record
from acejax.edit.manifest import Entry
from acejax.edit.profile import Profile
from acejax.edit.record import File
from acejax.edit.request import Options, Request, Result

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
WEIGHTS = (File("weights", "mmdit.safetensors", "1" * 32), File("lora", "../l.safetensors", "2" * 32, 0.8))
SAID = 'say "hé" {image} 星'


@pytest.fixture
def kept(tmp_path):
    """A result's PNG in out/, its pictures in in/."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    for index, name in enumerate(("a", "r", "s")):
        Image.fromarray(np.roll(PICTURE, index)).save(tmp_path / "in" / f"{name}.png")
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(tmp_path / "in" / "m.png")
    paths = [str(tmp_path / "in" / f"{name}.png") for name in "amrs"]
    out = tmp_path / "out" / "o.png"
    entry = Entry(str(out), SAID, None, *paths[:2], references=tuple(paths[2:]), seed=7)
    request, hashes = entry.open()
    used = [File(name, record.relative(out.parent, path), sha256)
            for (name, path), sha256 in zip(entry.inputs, hashes, strict=True)]
    profile = Profile.of(MMDiTConfig.ace_plus_fft())
    result = Result(PICTURE, "repainting", "told", None, 1.5, 16)
    options = Options(guidance=30, paste="off", grow=2, step_cache=0.5)
    about = record.make(profile, request, options, result, (1, 3), {"demo": True}, [*used, *WEIGHTS])
    files.write_picture(out, PICTURE, {record.KEY: about.text()})
    return out, about, entry


def test_a_png_keeps_everything(kept):
    out, about, entry = kept
    np.testing.assert_array_equal(files.read_picture(out), PICTURE)
    assert record.read(out) == about
    with Image.open(out) as image:  # as another program sees it
        found = json.loads(image.text["acejax"])
    sha256 = hashlib.sha256(pathlib.Path(entry.image).read_bytes()).hexdigest()
    assert found["files"][0] == {"field": "image", "path": "../in/a.png", "checksum": sha256, "scale": None}
    assert [file["field"] for file in found["files"]] == ["image", "mask", "references", "references", "weights",
                                                          "lora"]
    expected = {"form": 1, "acejax": acejax.__version__, "platform": record.platform(), "task": "repainting",
                "prompt": SAID, "told": "told", "seed": 7, "steps": 28, "guidance": 30.0, "scale": 1.0,
                "size": [30, 20], "crop": "auto", "paste": "off", "parity": None, "batch": [1, 3],
                "grow": 2, "step_cache": 0.5}
    assert {name: found[name] for name in expected} == expected


def test_how_a_result_was_put_back_is_named():
    flux = Profile.of(MMDiTConfig.ace_plus_fft())
    for profile, paste in ((flux, "feather"), (dataclasses.replace(flux, side=64), "changed")):
        about = record.make(profile, Request("x"), Options(), Result(PICTURE, "repainting", "x", None, None, 1), (0, 1),
                            {}, [])
        assert about.paste == paste


def test_the_edit_comes_back_wherever_its_folder_is(kept, tmp_path, monkeypatch):
    out, about, entry = kept
    monkeypatch.chdir("/")
    again = about.entry(out.parent, out, {})
    assert dataclasses.replace(again, task=None, size=None, scale=None) == entry
    assert record.changes(about, again, WEIGHTS) == []
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("in", "out"):
        shutil.move(tmp_path / name, moved / name)
    assert record.changes(about, about.entry(moved / "out", moved / "out" / "o.png", {}), WEIGHTS) == []
    files_ = about.files
    painted = dataclasses.replace(about, files=(*files_[:1], *files_[2:], files_[1]))  # the page's own mask comes last
    assert record.changes(painted, painted.entry(moved / "out", moved / "out" / "o.png", {}), WEIGHTS) == []
    lost = record.changes(about, about.entry(tmp_path / "out", moved / "out" / "o.png", {}), WEIGHTS)
    assert len(lost) == 4 and lost[0] == f"image {tmp_path}/in/a.png is not there"
    told = {"image": str(moved / "in/a.png"), "mask": str(moved / "in/m.png"),
            "references": [str(moved / "in/s.png"), str(moved / "in/r.png")]}
    swapped = record.changes(about, about.entry(tmp_path, moved / "out" / "o.png", told), WEIGHTS)
    assert len(swapped) == 2 and all("references" in line and "has changed" in line for line in swapped)
    with pytest.raises(UserError, match="has 2 references; found 1"):
        about.entry(tmp_path, out, {"references": ["x.png"]})


def test_the_size_is_the_one_asked_for(kept, tmp_path):
    """With parity a result is smaller than its picture; and a device is no picture to read."""
    out, about, entry = kept
    assert about.asked is None and about.entry(out.parent, out, {}).size is None
    assert dataclasses.replace(about, asked=(30, 20)).entry(out.parent, out, {}).size == "30x20"
    endless = dataclasses.replace(about, files=(dataclasses.replace(about.files[0], path="/dev/zero"),))
    assert record.changes(endless, endless.entry(out.parent, out, {}), None) == ["image /dev/zero is not there"]


def test_each_change_is_named(kept):
    out, about, entry = kept
    with open(entry.mask, "ab") as file:
        file.write(b"!")
    weights = [dataclasses.replace(WEIGHTS[0], checksum="3" * 32), WEIGHTS[1]]
    older = dataclasses.replace(about, acejax="0.0.9")
    told = record.changes(older, entry, weights)
    assert [line.split(" (")[0] for line in told] == [
        f"acejax was 0.0.9, is {acejax.__version__}", f"mask {entry.mask} has changed",
        "weights mmdit.safetensors has changed"]
    assert record.changes(about, about.entry(out.parent, out, {}), WEIGHTS[:1])[1:] == [
        "lora: 1 files were read, 0 are there"]


@pytest.mark.parametrize("name", ["Screenshot at 3.45\u202fPM.png", "e\u3000星\u200d.png", "caf\udce9.png"])
def test_any_name_of_a_file_is_kept(kept, name):
    """A narrow space, as macOS puts into names; a wide one and a joiner; and bytes that are no UTF-8."""
    out, about, entry = kept
    first = dataclasses.replace(about.files[0], path=f"../in/{name}")
    named = dataclasses.replace(about, files=(first, *about.files[1:]))
    files.write_picture(out, PICTURE, {record.KEY: named.text()})
    assert record.read(out) == named


def test_no_record_and_damaged_ones(kept, tmp_path):
    out, about, entry = kept
    for name in ("in/a.png", "in/m.png"):
        with pytest.raises(UserError, match="no record of an edit in it"):
            record.read(tmp_path / name)
    Image.fromarray(PICTURE).save(tmp_path / "o.jpg")
    with pytest.raises(UserError, match="o.jpg: no record"):
        record.read(tmp_path / "o.jpg")
    good = json.loads(about.text())
    older = {name: value for name, value in good.items() if name not in ("grow", "step_cache")}
    files.write_picture(tmp_path / "older.png", PICTURE, {record.KEY: json.dumps(older)})
    assert record.read(tmp_path / "older.png") == dataclasses.replace(about, grow=0, step_cache=None)
    for change in ({"form": 2}, {"seed": "7"}, {"files": [{}]}, {"files": 3}, {"batch": [0, 10**9]}, {"size": [1]},
                   {"opened": {"mesh": 5}}, {"files": [good["files"][0]] * 2}, {"jax": "\x1b[31m"}, {"jax": "\x9b31m"}):
        files.write_picture(out, PICTURE, {record.KEY: json.dumps(good | change)})
        with pytest.raises(UserError, match="o.png: its record can't be read"):
            record.read(out)
    files.write_picture(out, PICTURE, {record.KEY: "[]"})
    with pytest.raises(UserError, match="can't be read"):
        record.read(out)
