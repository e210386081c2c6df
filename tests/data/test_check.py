"""`acejax data check`: every fault by line and nothing else, and what a run will see."""

import collections
import io
import json
import math
import time

import numpy as np
import pytest
from PIL import Image

from acejax.cli.main import main
from acejax.data import check, manifest, pictures, progress, sheet
from acejax.data.layout import CanvasConfig
from tests.counts import count
from tests.data import odd_pictures as odd
from tests.data.test_manifest import written

TASKS = ("text", "insert", "subject", "pair")


class Album:
    """A folder of pictures, each with a mask of its size, to write manifests about."""

    def __init__(self, folder, pictures: int, megapixels: tuple[float, float], seed: int = 0):
        self.folder, self.rng, self.sizes = folder, np.random.default_rng(seed), []
        (folder / "deep").mkdir(parents=True)
        for index in range(pictures):
            area, ratio = self.rng.uniform(*megapixels) * 1e6, self.rng.uniform(0.5, 2)
            size = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            small = Image.fromarray(self.rng.integers(0, 256, (12, 12, 3)).astype(np.uint8))
            picture = small.resize(size[::-1], Image.Resampling.BICUBIC)
            exif = Image.Exif()
            if index % 7 == 1:  # a camera on its side: the header's size is the other way round
                exif[0x0112] = 6
                size = size[::-1]
            elif index % 7 == 2:
                picture = picture.convert("CMYK")
            picture.save(folder / f"{index}.jpg", quality=90, exif=exif)
            mask = np.zeros(size, np.uint8)
            mask[size[0] // 4:size[0] // 2, :size[1] // 2] = 255
            Image.fromarray(mask).save(folder / f"{index}.png", compress_level=1)
            self.sizes.append(size)

    def line(self) -> dict:
        """A good one."""
        task = TASKS[self.rng.integers(len(TASKS))]
        one, other, third = (int(index) for index in self.rng.integers(0, len(self.sizes), 3))
        line = {"task": task, "prompt": f"make {one} of {other}", "target": f"{one}.jpg"}
        if task == "insert":
            line |= {"image": f"{one}.jpg", "mask": f"{one}.png"}
        if task in ("subject", "pair"):
            line["references"] = [f"{other}.jpg", f"{third}.jpg"][:1 + (task == "pair")]
        return line

    def spoilt(self, kind: int, number: int) -> tuple[dict | str, str]:
        """A line with one fault of ten kinds, and the field that is wrong."""
        line, one = self.line(), int(self.rng.integers(len(self.sizes)))
        alone = {"task": line["task"], "prompt": line["prompt"]}
        field = ("target", "image", "references")[number % 3] if kind < 4 else "target"
        name = f"bad{kind}_{number}.jpg"
        if kind == 0:  # truncated
            data = (self.folder / f"{one}.jpg").read_bytes()
            (self.folder / name).write_bytes(data[:int(self.rng.integers(len(data) // 10, len(data)))])
        elif kind == 1:
            name = "deep"  # a folder
        elif kind == 2:
            (self.folder / name).write_text("<html>404 Not Found</html>")
        # 3: not there
        if kind < 4:
            line = alone | {"target": f"{one}.jpg"} | {field: [f"{one}.jpg", name] if field == "references" else name}
            return line, "references[1]" if field == "references" else field
        if kind == 4:  # a mask of another picture
            other = next(index for index in range(len(self.sizes)) if self.sizes[index] != self.sizes[one])
            return alone | {"target": f"{one}.jpg", "image": f"{one}.jpg", "mask": f"{other}.png"}, "mask"
        return [(alone | {"target": f"{one}.jpg", "mask": f"{one}.png"}, "mask"), (line | {"prompt": ""}, "prompt"),
                (alone, "target"), (json.dumps(line)[:-1], ""),
                (json.dumps(line)[:-1] + ', "target": "x.jpg"}', "target")][kind - 5]


def told(report: dict) -> set[tuple[int, str]]:
    found = [(fault["line"], fault["field"]) for fault in report["faults"]]
    assert len(found) == len(set(found))
    return set(found)


def test_finds_every_fault_and_nothing_else(tmp_path, capsys):
    lines, faulty = count((300, 20), (10_000, 200))
    album = Album(tmp_path, count(30, 500), count((0.005, 0.02), (1, 2)))
    spoilt = dict(zip(album.rng.choice(lines, faulty, replace=False) + 1, range(faulty), strict=True))
    content, wanted = [], set()
    for number in range(1, lines + 1):
        line, field = album.spoilt(spoilt[number] % 10, number) if number in spoilt else (album.line(), None)
        content.append(line)
        wanted |= {(number, field)} if number in spoilt else set()
    path = written(tmp_path / "pairs.jsonl", *content)
    started = time.monotonic()
    assert main(["data", "check", str(path), f"--json={tmp_path / 'r.json'}", "--batch_size=8"]) == 2
    took = time.monotonic() - started
    report = json.loads((tmp_path / "r.json").read_text())
    assert told(report) == wanted and len(wanted) == faulty
    printed = capsys.readouterr()
    assert printed.err == f"acejax: {path}: {faulty} faults in {faulty} of {lines:,} samples\n"
    listed = [line for line in printed.out.split("\nfaults")[1].splitlines()[1:] if line.startswith("  pairs.jsonl:")]
    assert len(listed) == min(faulty, 50)
    if faulty > 50:
        assert f"(the first 50 of {faulty}; --json=FILE has all)" in printed.out
        print(f"{lines:,} lines, {report['files']:,} files in {took:.1f} s")

    good = [line for number, line in enumerate(content, 1) if number not in spoilt]
    tasks = collections.Counter(line["task"] for line in good)
    assert {task: sum(counts.values()) for task, counts in report["tasks"].items()} == tasks
    assert report["stages"] == {"0-ref": tasks["text"] + tasks["insert"], "N-ref": tasks["subject"] + tasks["pair"]}
    assert report["samples"] == lines and report["good"] == len(good) == sum(report["buckets"].values())
    assert report["steps_per_epoch"] == math.ceil(len(good) / 8)
    areas = sorted(np.prod(album.sizes[int(line["target"][:-4])]) for line in good)
    assert [np.prod(report["sizes"]["target"][name]) for name in ("min", "median", "max")] == [
        areas[0], areas[len(areas) // 2], areas[-1]]


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    return Album(tmp_path_factory.mktemp("album") / "album", 6, (0.01, 0.02))


def test_each_file_is_opened_once(album, tmp_path, monkeypatch):
    opened = collections.Counter()

    def counted(path, original=pictures.opened):
        opened[str(path)] += 1
        return original(path)
    monkeypatch.setattr(pictures, "opened", counted)
    found = manifest.read(written(tmp_path / "a.jsonl", *(album.line() for _ in range(40))), prefix=album.folder)
    seen = []
    report = check.check(found, advance=seen.append)
    assert not report.faults and set(opened.values()) == {1} and len(opened) == report.files == sum(seen)


def test_decoding_finds_what_headers_hide(album, tmp_path, capsys):
    """Damage inside, and masks that generate nothing: white at 1 of 255, and black."""
    data = bytearray(odd.encoded(odd.picture(np.random.default_rng(0), 80, 90), "PNG"))
    at = data.index(b"IDAT") + 20
    data[at:at + 40] = bytes(40)
    (tmp_path / "damaged.png").write_bytes(data)
    mask = Image.fromarray(np.eye(*album.sizes[0], dtype=np.uint8))
    mask.save(tmp_path / "label.png")
    odd_line = {"task": "x", "prompt": "p", "target": f"{album.folder}/0.jpg", "image": f"{album.folder}/0.jpg"}
    path = written(tmp_path / "a.jsonl", odd_line, odd_line | {"mask": f"{album.folder}/0.png"},
                   odd_line | {"mask": "label.png"}, odd_line | {"target": "damaged.png"})
    assert main(["data", "check", str(path)]) == 0
    assert main(["data", "check", str(path), "--decode", f"--json={tmp_path / 'r.json'}"]) == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert told(report) == {(3, "mask"), (4, "target")} and report["decoded"]
    out = capsys.readouterr().out
    assert "a.jsonl:3: mask: found nothing brighter than 1; expected white (255) where to generate" in out
    assert "damaged PNG file" in out


def test_warnings_are_no_faults(album, tmp_path):
    for name, size in (("tall.png", (500, 100)), ("tiny.png", (90, 30)), ("wide.png", (70, 90))):
        Image.new("RGB", size[::-1]).save(tmp_path / name)
    text = {"task": "x", "prompt": "p", "target": "wide.png"}
    path = written(tmp_path / "a.jsonl", text, text | {"references": ["tall.png"]}, text | {"image": "tiny.png"},
                   text | {"image": "wide.png"})
    assert main(["data", "check", str(path), f"--json={tmp_path / 'r.json'}"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["faults"]
    assert [(odd["line"], odd["field"], odd["message"]) for odd in report["warnings"]] == [
        (2, "references[0]", "is 100 x 500 pixels: only its middle, 4:1, is seen"),
        (3, "image", "is 30 x 90 pixels, its target 90 x 70 pixels: it will be stretched"),
        (3, "image", "is 30 x 90 pixels: less than 64 pixels a side")]


def test_what_a_run_costs(tmp_path):
    """Tokens by hand: 16 x 16 pixels each, a reference of the drawn height beside the target."""
    for name, size in (("a.png", (320, 480)), ("b.png", (160, 160)), ("c.png", (640, 640))):
        Image.new("RGB", size[::-1]).save(tmp_path / name)
    lines = [{"task": "x", "prompt": "p", "target": name} for name in ("a.png", "b.png", "c.png", "c.png")]
    lines.append(lines[0] | {"references": ["b.png"]})
    found = manifest.read(written(tmp_path / "a.jsonl", *lines))
    report = check.check(found, CanvasConfig.lora(max_tokens=1024))
    assert report.tokens.tolist() == [600, 100, 1024, 1024, 600 + 20 * 20]
    assert report.buckets == (256, 768, 1024) and report.steps(batch_size=2) == 3
    assert report.steps(batch_tokens=2048) == math.ceil(1 / 8 + 1 / 2 + 3 / 2)
    drawn = {int(check.check(found, CanvasConfig(max_tokens=1024), seed=seed).tokens[-1]) for seed in range(8)}
    assert len(drawn) > 2 and all(600 < tokens <= 1000 and tokens % 20 == 0 for tokens in drawn)
    assert check.check(found, CanvasConfig(max_tokens=1024), seed=3).tokens[-1] == check.check(
        found, CanvasConfig(max_tokens=1024), seed=3).tokens[-1]


@pytest.mark.parametrize("options", [[], ["--nosplit"], ["--parity=reference", "--max_tokens=64"]])
def test_the_sheet_shows_what_the_model_gets(album, tmp_path, options):
    lines = [album.line() for _ in range(20)]
    path = written(album.folder / "a.jsonl", *lines)
    assert main(["data", "check", str(path), f"--sheet={tmp_path / 's.png'}", *options]) == 0
    picture = np.asarray(Image.open(io.BytesIO((tmp_path / "s.png").read_bytes())))
    assert picture.shape[0] > 300 and picture.shape[1] > 400 and picture.std() > 20

    found = manifest.read(path)
    config = CanvasConfig(max_tokens=64) if options != ["--nosplit"] else CanvasConfig.lora(max_tokens=64)
    row = next(row for row in found.rows if row.mask)
    panels, tokens = sheet.panels(found, row, config, np.random.default_rng(0))
    shown, kept, *changed, target = panels
    height, width = target.shape[:2]
    assert len(panels) == 3 + config.split and tokens == height * width // 256
    inside = np.s_[height // 4 + 8:height // 2 - 8, 8:width // 2 - 8]
    assert (kept[inside] == 128).all() == config.split  # grey where the mask is white, if that stands apart
    assert np.abs(shown[inside].astype(int) - target[inside]).mean() > 10
    outside = np.s_[height * 3 // 4:, :]
    np.testing.assert_array_equal(kept[outside], target[outside])
    for part in changed:
        assert (part[outside] == 128).all() and part[inside].std() > 0


def test_the_sheet_takes_some_of_each_task():
    for tasks, each in ((4, 3), (8, 3), (10, 2), (24, 1)):
        rows = [manifest.Row(line, f"task{line % tasks}", "p", "t") for line in range(1, 1001)]
        assert collections.Counter(row.task for row in sheet.pick(rows)) == {f"task{i}": each for i in range(tasks)}
    assert [row.line for row in sheet.pick(rows[:5])] == [1, 2, 3, 4, 5]
    many = [manifest.Row(line, f"task{line}", "p", "t") for line in range(100)]
    assert len(sheet.pick(many)) == sheet.MOST


@pytest.mark.parametrize("made", ["dataset_info.json", ".building", "pets/1.0.0/dataset_info.json"])
def test_a_dataset_is_no_manifest(made, tmp_path, capsys):
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).touch()
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "found a TFDS dataset; expected a manifest" in capsys.readouterr().err


def test_a_long_check_tells_how_far_it_is(album, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    path = written(tmp_path / "a.jsonl", *(album.line() for _ in range(3)))
    assert main(["data", "check", str(path), f"--prefix={album.folder}"]) == 0
    assert "checking: 1 of " in capsys.readouterr().out


def test_from_a_bucket(album, bucket, capsys):
    for file in album.folder.glob("?.*"):
        (bucket / file.name).write_bytes(file.read_bytes())
    (bucket / "a.jsonl").write_text("\n".join(json.dumps(album.line()) for _ in range(9)))
    assert main(["data", "check", "gs://pictures/a.jsonl", "--decode", "--sheet=gs://pictures/s.png",
                 "--json=gs://pictures/r.json"]) == 0
    assert json.loads((bucket / "r.json").read_text())["good"] == 9
    assert pictures.whole((bucket / "s.png").read_bytes(), "s.png")
    assert "9 samples" in capsys.readouterr().out
