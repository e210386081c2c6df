"""Manifests of three forms: what is read, and every fault by line and field."""

import json
import pickle
import resource
import time

import numpy as np
import pytest
from PIL import Image

import acejax
from acejax.data import manifest, pictures
from acejax.data.manifest import Row
from tests.counts import count
from tests.data import odd_pictures as odd

GOOD = {"task": "insert", "prompt": "a hat", "target": "t.png", "image": "i.jpg", "mask": "m.png",
        "references": ["r.png", "/far/s.png"]}


def written(path, *lines: str | bytes | dict, end: bytes = b"\n"):
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + end for text in texts))
    return path


def faults(found: manifest.Manifest) -> list[tuple[int, str]]:
    return [(fault.line, fault.field) for fault in found.faults]


def test_jsonl(tmp_path):
    path = written(tmp_path / "a.jsonl", GOOD, "", {"task": "text", "prompt": " é ", "target": "gs://b/x.png"}, "  ",
                   GOOD | {"image": None, "mask": None, "references": None, "detail": "from Rome"})
    found = manifest.read(path)
    assert not found.faults
    one, two, three = found.rows
    assert one == Row(1, "insert", "a hat", f"{tmp_path}/t.png", f"{tmp_path}/i.jpg", f"{tmp_path}/m.png",
                      (f"{tmp_path}/r.png", "/far/s.png"))
    assert two == Row(3, "text", "é", "gs://b/x.png")
    assert (three.line, three.image, three.references, three.detail) == (5, None, (), "from Rome")
    assert manifest.read(path, prefix="gs://b/c/").rows[0].target == "gs://b/c/t.png"
    assert found.where(3) == "a.jsonl:3"


def test_text_of_ace(tmp_path):
    path = written(tmp_path / "train.csv", "i.png#;#m.png#;##;#t.png#;#put, a {image} there#;#local_editing",
                   "#;##;#r.png#;#t.png#;#{x}#;#", end=b"\r\n")
    one, two = manifest.read(path).rows
    assert one == Row(1, "local_editing", "put, a {image} there", f"{tmp_path}/t.png", f"{tmp_path}/i.png",
                      f"{tmp_path}/m.png")
    assert two == Row(2, "default", "{x}", f"{tmp_path}/t.png", references=(f"{tmp_path}/r.png",))
    path = written(tmp_path / "other.txt", "a.png#;#17#;#b.png#;#t.png#;#hello")
    (row,) = manifest.read(path, "ref_image,_,ref_image,target_image,prompt").rows
    assert row == Row(1, "default", "hello", f"{tmp_path}/t.png",
                      references=(f"{tmp_path}/a.png", f"{tmp_path}/b.png"))
    for fields, message in (("prompt,target", "does not know 'target'"), ("prompt", "lacks target_image"),
                            ("prompt,prompt,target_image", "names prompt twice")):
        with pytest.raises(acejax.UserError, match=message):
            manifest.read(path, fields)


@pytest.mark.parametrize("content, message", [
    (None, "no such file or folder"), (b"\xff\xfe{\0", "found UTF-16; expected UTF-8"),
    (b"\x89PNG\r\n\x1a\n\0\0", "found a binary file"), (b'[\n{"task": 3}]', "found a JSON list"),
])
def test_files_that_are_no_manifests(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(acejax.UserError, match=message):
        manifest.read(path)


TEXT_GOOD = "i.png#;#m.png#;#r.png#;#t.png#;#a hat#;#insert"
JSON_LINES = [  # a line, and the fields that are wrong in it
    (GOOD, set()), (GOOD | {"references": []}, set()), ({"target": "t", "prompt": "p", "task": "x"}, set()),
    ({"task": "x", "prompt": "p"}, {"target"}), ({"task": "x", "target": "t"}, {"prompt"}),
    ({"prompt": "p", "target": "t"}, {"task"}), (GOOD | {"promt": "x"}, {"promt"}), (GOOD | {"target": 5}, {"target"}),
    (GOOD | {"references": "r.png"}, {"references"}), (GOOD | {"references": ["r", None]}, {"references[1]"}),
    (GOOD | {"references": ["", "r"]}, {"references[0]"}), (GOOD | {"image": ["a"]}, {"image", "mask"}),
    (GOOD | {"prompt": " "}, {"prompt"}), (GOOD | {"target": ""}, {"target"}), (GOOD | {"image": None}, {"mask"}),
    (GOOD | {"target": "https://x/y.png"}, {"target"}), (GOOD | {"prompt": "\ud800"}, {"prompt"}),
    (GOOD | {"mask": "m\0"}, {"mask"}), (json.dumps(GOOD)[:-1] + ', "task": "y"}', {"task"}),
    (json.dumps(GOOD)[:-9], {""}), ("[]", {""}), ("3", {""}), ("{" * 200_000, {""}), (b'{"task": "\xe9"}', {""}),
    ("i.png,t.png,hello", {""}), ("x" * 1_100_000, {""}), ('{"task": 1' + 5000 * "0" + "}", {""}),
    (GOOD | {"prompt": 3, "target": True, "x": {}}, {"prompt", "target", "x"})]
TEXT_LINES = [
    (TEXT_GOOD, set()), (TEXT_GOOD.replace("r.png", ""), set()), (TEXT_GOOD.replace("insert", ""), set()),
    (TEXT_GOOD.replace("t.png", ""), {"target"}), (TEXT_GOOD.replace("a hat", " "), {"prompt"}),
    (TEXT_GOOD.replace("i.png", ""), {"mask"}), (TEXT_GOOD.replace("#;#insert", ""), {""}),
    (TEXT_GOOD + "#;#", {""}), (TEXT_GOOD.replace("a hat", "a#;#hat"), {""}), ("t.png", {""}),
    (TEXT_GOOD.encode() + b"\xff", {""}), (TEXT_GOOD.replace("r.png", "http://r.png"), {"references[0]"}),
    (json.dumps(GOOD), {""}), (TEXT_GOOD.replace("#;#", "#,#"), {""})]


def test_mutated_manifests(tmp_path):
    """Lines drawn from those above, with any line ends, blank lines and byte order mark: exactly their faults."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(count(60, 1000)):
        rng = np.random.default_rng(case)
        pool, name = ((JSON_LINES, "a.jsonl"), (TEXT_LINES, "a.txt"))[case % 2]
        lines, wanted, good = [pool[0][0]], [], [1]
        for _ in range(rng.integers(1, 12)):
            lines += ["" if rng.random() < 0.5 else " \t"] * int(rng.integers(0, 3) * (rng.random() < 0.2))
            line, wrong = pool[rng.integers(len(pool))]
            lines.append(line)
            wanted += [(len(lines), field) for field in wrong]
            good += [] if wrong else [len(lines)]
        path = written(tmp_path / name, *lines, end=(b"\n", b"\r\n")[rng.integers(2)])
        data = (b"", b"\xef\xbb\xbf")[rng.integers(2)] + path.read_bytes()
        path.write_bytes(data[:-1] if rng.random() < 0.5 and data[-2:] != b"\r\n" else data)
        started = time.monotonic()
        found = manifest.read(path)
        assert time.monotonic() - started < 10
        assert set(faults(found)) == set(wanted) and len(found.faults) == len(wanted), case
        assert [row.line for row in found.rows] == good, case
        assert all("\n" not in found.told(fault) and len(found.told(fault)) < 400 for fault in found.faults)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def test_random_bytes(tmp_path):
    """Whatever the bytes: each line is a row, or has faults, or is blank; or the whole is refused in one message."""
    kinds = set()
    for case in range(count(100, 1000)):
        rng = np.random.default_rng(case)
        path = written(tmp_path / ("a.jsonl", "a.txt")[case % 2], *((GOOD,) * 5, (TEXT_GOOD,) * 5)[case % 2])
        data = bytearray(path.read_bytes())
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            data[at] = rng.integers(*(((0, 256), (97, 123))[case // 2 % 2]))
        path.write_bytes(data)
        try:
            found = manifest.read(path)
        except acejax.UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            kinds.add("refused")
            continue
        lines = [number for number, line in enumerate(bytes(data).split(b"\n"), 1) if line.strip()]
        assert sorted({fault.line for fault in found.faults} | {row.line for row in found.rows}) == lines
        kinds |= {"fault"} if found.faults else {"good"}
    assert kinds == {"refused", "fault", "good"}


def filled(folder):
    """A folder of pictures: two tasks, and a sample of none."""
    data = odd.encoded(odd.picture(np.random.default_rng(0), 20, 30), "PNG")
    for name in ("insert/cat.jpg", "insert/cat.edit.png", "insert/cat.mask.PNG", "pair/a.b.png", "pair/a.b.ref.webp",
                 "pair/a.b.ref2.png", "one.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for name in ("insert/cat.txt", "pair/a.b.txt", "one.txt"):
        (folder / name).write_bytes(f"\ufeffprompt of {name}\r\n".encode())
    (folder / "README.md").write_text("mine")
    (folder / "insert" / ".DS_Store").write_text("")
    return folder


def test_a_folder(tmp_path):
    folder = filled(tmp_path / "pets")
    found = manifest.read(folder)
    assert not found.faults and [found.where(row.line) for row in found.rows] == [
        "pets/insert/cat", "pets/one", "pets/pair/a.b"]
    cat, one, pair = found.rows
    assert cat == Row(1, "insert", "prompt of insert/cat.txt", f"{folder}/insert/cat.jpg",
                      f"{folder}/insert/cat.edit.png", f"{folder}/insert/cat.mask.PNG")
    assert one == Row(2, "default", "prompt of one.txt", f"{folder}/one.png")
    assert pair.references == (f"{folder}/pair/a.b.ref.webp", f"{folder}/pair/a.b.ref2.png") and not pair.image
    assert manifest.Source(found)[2].name == "pets/pair/a.b"


@pytest.mark.parametrize("change, where, field, message", [
    (lambda at: (at / "one.txt").unlink(), "pets/one", "prompt", "is missing"),
    (lambda at: (at / "one.txt").write_text(" \n"), "pets/one", "prompt", "one.txt is empty"),
    (lambda at: (at / "one.txt").write_bytes(b"\xff"), "pets/one", "prompt", "expected UTF-8"),
    (lambda at: (at / "one.png").unlink(), "pets/one", "target", "is missing"),
    (lambda at: (at / "one.jpg").touch(), "pets/one", "target", "found one.jpg and one.png; expected one of them"),
    (lambda at: (at / "insert" / "cat.edit.png").unlink(), "pets/insert/cat", "mask", "expected NAME.edit"),
    (lambda at: (at / "pair" / "a.b.ref.webp").unlink(), "pets/pair/a.b", "references", "found the numbers 2"),
    (lambda at: (at / "insert" / "dog.heic").touch(), "pets/insert/dog.heic", "", "a file of another kind"),
    (lambda at: (at / "pair" / "deep").mkdir(), "pets/pair/deep", "", "a file of another kind"),
])
def test_faults_of_a_folder(tmp_path, change, where, field, message):
    change(filled(tmp_path / "pets"))
    found = manifest.read(tmp_path / "pets")
    (fault,) = found.faults
    assert (found.where(fault.line), fault.field) == (where, field) and message in fault.message
    assert len(found.rows) == (3 if where.endswith(("heic", "deep")) else 2)


def test_a_folder_with_a_manifest_in_it(tmp_path):
    (tmp_path / "a.png").touch()
    written(tmp_path / "pairs.jsonl", GOOD)
    with pytest.raises(acejax.UserError, match="found pairs.jsonl and no prompts in .txt files"):
        manifest.read(tmp_path)


def test_a_source_reads_its_pictures_and_opens_again_elsewhere(tmp_path):
    array = odd.picture(np.random.default_rng(0), 20, 30)
    Image.fromarray(array).save(tmp_path / "t.png")
    path = written(tmp_path / "a.jsonl", *({"task": "text", "prompt": f"p{index}", "target": name}
                                           for index, name in enumerate(("t.png", "no.png"))))
    source = manifest.Source(manifest.read(path))
    assert len(source) == 2 and source[0].name == "a.jsonl:1"
    assert source[-2].target == (tmp_path / "t.png").read_bytes() and source[0].mask is None
    with pytest.raises(acejax.UserError, match=r"a.jsonl:2: picture .*no.png: no such file"):
        _ = source[1]
    passed = pickle.dumps(source)
    assert len(passed) < 500 and pickle.loads(passed)[0] == source[0]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(acejax.UserError, match="has changed since this run began"):
        pickle.loads(passed)
    written(path, GOOD, GOOD | {"prompt": ""}, GOOD | {"mask": 3, "task": ""})
    with pytest.raises(acejax.UserError, match=r"a.jsonl:2: prompt: is empty; 2 of 3 samples have faults"):
        manifest.Source(manifest.read(path))
    with pytest.raises(acejax.UserError, match="found no sample"):
        manifest.Source(manifest.read(written(path, "", "")))


def test_no_more_is_read_than_a_unit_needs(tmp_path, monkeypatch):
    for name in ("t", "a", "b"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    path = written(tmp_path / "a.jsonl", {"task": "x", "prompt": "p", "target": "t.png", "image": "t.png",
                                          "references": ["a.png", "b.png"]})
    source, seen, read = manifest.Source(manifest.read(path)), [], pictures.read
    monkeypatch.setattr(pictures, "read", lambda path: seen.append(path[-5]) or read(path))

    def picked(*unit):
        seen.clear()
        sample = source.pick(0, *unit) if unit else source[0]
        return "".join(seen), (sample.target, sample.image, sample.mask, *sample.references)

    assert picked() == ("tab", (b"t", b"t", None, b"a", b"b"))
    assert picked(-1) == ("t", (b"t", b"t", None, b"", b""))
    assert picked(1) == ("b", (b"", b"", None, b"", b"b"))


def test_from_a_bucket(bucket, tmp_path):
    """gs:// paths all the way; the folder is the same one."""
    folder = filled(tmp_path / "pets")
    for file in folder.rglob("*"):
        if file.is_file():
            place = bucket / "pets" / str(file.relative_to(folder))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    (bucket / "pets" / "a.jsonl").write_text(json.dumps({"task": "x", "prompt": "p", "target": "one.png"}))
    (row,) = manifest.read(bucket / "pets" / "a.jsonl").rows
    assert row.target == "gs://pictures/pets/one.png"
    (bucket / "pets" / "a.jsonl").unlink()
    here, there = manifest.Source(manifest.read(folder)), manifest.Source(manifest.read(bucket / "pets"))
    assert len(here) == 3 and list(here) == list(pickle.loads(pickle.dumps(there)))
    with pytest.raises(acejax.UserError, match="manifest gs://pictures/no.jsonl: no such file or folder"):
        manifest.read(bucket / "no.jsonl")
