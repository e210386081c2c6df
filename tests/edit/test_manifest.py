"""Manifests of edits: what lines become, and faults by file and line."""

import json

import numpy as np
import pytest
from PIL import Image

from acejax import UserError
from acejax.edit.manifest import Entry, read, seeded


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "edits.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path
    return write


def test_lines_become_edits(write, tmp_path):
    path = write("# two edits and a default", {"image": "a.png", "mask": "/abs/m.png", "prompt": "x", "seed": 5}, "",
                 {"references": ["r.png", "gs://b/s.png"], "task": "subject", "out": "sub/two.webp", "size": "640x480"})
    out = tmp_path / "results"
    first, second, third = read(path, out, {"prompt": "of all", "scale": 0.5}, [1, 2])
    assert first == Entry(str(out / "00002.png"), "x", None, str(tmp_path / "a.png"), "/abs/m.png", scale=0.5, seed=5,
                          line="edits.jsonl:2")
    assert (second.out, third.out) == (str(out / "sub/two-1.webp"), str(out / "sub/two-2.webp"))
    assert (second.seed, third.seed, second.prompt, second.line) == (1, 2, "of all", "edits.jsonl:4")
    assert second.references == (str(tmp_path / "r.png"), "gs://b/s.png")
    assert not out.exists()


@pytest.mark.parametrize("line, message", [
    ("{}}", "edits.jsonl:2: found no good JSON"),
    ("[1]", "edits.jsonl:2: expected an object"),
    ('{"seed": 1, "seed": 2}', r"edits.jsonl:2: found no good JSON \(a field is there twice\)"),
    ({"promt": "x"}, "edits.jsonl:2: 'promt' is no field; the fields are out, prompt, task"),
    ({"prompt": 3}, "edits.jsonl:2: prompt is 3; expected str"),
    ({"references": "r.png"}, "edits.jsonl:2: references is 'r.png'"),
    ({"seed": -1}, "edits.jsonl:2: seed is -1; expected 0 to"),
    ({"seed": True}, "edits.jsonl:2: seed is True"),
    ({"mask": "m.png"}, "edits.jsonl:2: mask without image"),
    ({"size": "640"}, "edits.jsonl:2: size is '640'; expected WIDTHxHEIGHT"),
    ({"out": "../x.png"}, r"edits.jsonl:2: out is '../x.png'; expected a file below"),
    ({"out": "x.txt"}, "edits.jsonl:2: .*'.txt' names no picture format"),
    ({"image": "00003.png", "out": "o.png"}, r"edits.jsonl:3: out is .*00003.png, a picture that edits.jsonl:2 reads"),
    ({"out": "00001.png"}, r"edits.jsonl:2: out is .*00001.png, as in edits.jsonl:1"),
])
def test_faults_are_named_by_line(write, tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read(write({"prompt": "x"}, line, {"prompt": "y"}), tmp_path, {}, [0])


def test_faults_are_counted_and_files_missed(write, tmp_path):
    with pytest.raises(UserError, match=r"edits.jsonl:1: .* \(2 lines have faults\)"):
        read(write("{", {"prompt": "x"}, "}"), tmp_path, {}, [0])
    with pytest.raises(UserError, match="found no edit"):
        read(write("", "# nothing"), tmp_path, {}, [0])
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.jsonl", tmp_path, {}, [0])
    with pytest.raises(UserError, match="expected a folder; .*no is not there"):
        read(write({"prompt": "x"}), tmp_path / "no" / "out", {}, [0])


def test_an_entry_opens_its_files(tmp_path):
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    Image.fromarray(picture).save(tmp_path / "a.png")
    mask = np.array([[0, 255, 0, 0, 200]] * 4, np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.png")
    paths = [str(tmp_path / name) for name in ("a.png", "m.png")]
    entry = Entry(str(tmp_path / "o.png"), "x", None, *paths, references=(paths[0],), size="30x20", seed=3)
    request, hashes = entry.open()
    np.testing.assert_array_equal(request.image, picture)
    np.testing.assert_array_equal(request.mask, mask)
    np.testing.assert_array_equal(request.references[0], picture)
    assert (request.size, request.seed, request.control) == ((20, 30), 3, None)
    assert [name for name, _ in entry.inputs] == ["image", "mask", "references"] and hashes[0] == hashes[2]
    assert [one.out.rpartition("/")[2] for one in seeded(entry, [4, 4, 5])] == ["o-4.png", "o-5.png"]
    assert seeded(entry, [9])[0].out == entry.out
    with pytest.raises(UserError, match="is a picture to read"):
        Entry(paths[0], "x", None, *paths)
