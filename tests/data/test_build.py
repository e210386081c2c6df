"""Building a dataset: in parallel, cut off and gone on with, and every mistake in one message."""

import json
import time

import pytest

from acejax import UserError
from acejax.cli import data_build
from acejax.data import dataset, manifest, shards
from acejax.data.build import build, record
from acejax.data.dataset_folder import BUILDING
from tests.counts import count
from tests.data import drawn

ROWS = list(drawn.samples(24))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return drawn.write(tmp_path_factory.mktemp("pairs") / "p", ROWS)


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    """The files of an uninterrupted build in one process."""
    return files(build(tmp_path_factory.mktemp("whole"), {"train": manifest.Source(manifest.read(pairs))}, shards=6))


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Slow(manifest.Source):
    """A manifest whose files take their time."""

    def __getitem__(self, index):
        time.sleep(0.03)
        return super().__getitem__(index)

    def __reduce__(self):
        return slow, (self.path,)


def slow(path):
    return Slow(manifest.read(path))


def build_slowly(path, data_dir, workers):
    build(data_dir, {"train": slow(path)}, shards=6, workers=workers)


def test_parallel_equals_serial_and_is_said(pairs, whole, tmp_path, capsys):
    assert data_build.main(["--data_dir", str(tmp_path / "out"), "--shards=6", "--workers=2", str(pairs),
                            f"--json={tmp_path / 'r.json'}"]) == 0
    folder = tmp_path / "out" / "condition_units" / "1.0.0"
    assert files(folder) == whole
    said, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert f"{folder}, split train: 24 samples in 6 files" in said and f"as_data_source('train')" in said
    assert report["wrote_samples"] == report["records"] == 24 and report["skipped"] == []
    assert data_build.main(["--data_dir", str(tmp_path / "out"), str(pairs)]) == 0
    assert "was there already" in capsys.readouterr().out
    rows = dataset.read(folder, "train")
    assert [row.prompt for row in rows] == [row.prompt for row in ROWS]


def test_killed_at_any_moment_it_goes_on(pairs, whole, tmp_path):
    folder = tmp_path / "condition_units" / "1.0.0"

    def written():
        return len(list(folder.glob("*array_record*")))

    for kill in range(count(2, 20)):
        workers = 1 + (kill % 4 == 0)
        run = shards._context().Process(target=build_slowly, args=(pairs, tmp_path, workers))
        run.start()
        before = written()
        while run.is_alive() and written() in (0, before):
            time.sleep(0.005)
        time.sleep(0.02 * (kill % 6))
        run.kill()
        run.join()
        time.sleep(0.05)
        done = written()
        if not (folder / "dataset_info.json").exists():
            with pytest.raises(UserError, match="a dataset whose build did not end; the same .* goes on"):
                dataset.read(folder)
        if workers > 1:
            time.sleep(0.3)
            assert written() == done, "workers end with the process that started them"
        if done == 6 and (folder / "dataset_info.json").exists() or kill % 3 == 2:
            for file in [*folder.glob("*"), *(folder / BUILDING).glob("*")]:  # from the start again
                if file.is_file():
                    file.unlink()
    build(tmp_path, {"train": manifest.Source(manifest.read(pairs))}, shards=6)
    assert files(folder) == whole


def test_what_is_done_is_not_done_again(pairs, whole, tmp_path):
    """A broken picture stops the build; mended, only what is missing is written."""
    source, folder = manifest.Source(manifest.read(pairs)), tmp_path / "condition_units" / "1.0.0"
    target = pairs.parent / "13.target"
    data = target.read_bytes()
    target.write_bytes(data[:-200])
    try:
        with pytest.raises(UserError, match=r"picture pairs.jsonl:14 \(target\): "):
            build(tmp_path, {"train": source}, shards=6)
    finally:
        target.write_bytes(data)
    before = {file.name: file.stat().mtime for file in folder.glob("*array_record*")}
    assert len(before) == 3
    calls = []
    build(tmp_path, {"train": source}, shards=6, progress=lambda *told: calls.append(told))
    assert calls[0] == ("train", 12, 24, 0) and calls[-1][:3] == ("train", 24, 24)
    assert all((folder / name).stat().st_mtime for name in before) and files(folder) == whole
    assert not (folder / BUILDING).exists()


def test_broken_samples_can_be_skipped(pairs, tmp_path, capsys):
    """A line with a fault, a picture that ends too early and one that is not there."""
    copy = drawn.write(tmp_path / "p", ROWS)
    copy.write_text(copy.read_text().replace('"target": "3.target"', '"goal": "3.target"'))
    (tmp_path / "p" / "5.target").write_bytes(ROWS[5].target[:300])
    (tmp_path / "p" / "7.image").unlink()
    line = [str(copy), f"--data_dir={tmp_path}", "--shards=3", "--workers=1"]
    with pytest.raises(UserError, match="pairs.jsonl:4: "):
        data_build.main(line)
    assert data_build.main([*line, "--skip_broken"]) == 0
    said = capsys.readouterr().out
    assert "21 samples in 3 files" in said and "skipped 4 samples" in said  # line 4 has two faults
    assert "pairs.jsonl:6 (target)" in said and "pairs.jsonl:8: picture" in said
    rows = dataset.read(tmp_path)
    assert [row.detail for row in rows] == [row.detail for row in ROWS if row.detail not in ("d3", "d5", "d7")]


def test_other_samples_are_noticed(pairs, tmp_path):
    build(tmp_path, {"train": ROWS}, shards=6)
    with pytest.raises(UserError, match=r"split 'train' was made of other samples .*: 23 samples now, 24 then"):
        build(tmp_path, {"train": ROWS[1:]})
    with pytest.raises(UserError, match="the first difference is among samples 8 to 11, from pairs:9"):
        build(tmp_path, {"train": [*ROWS[:9], ROWS[0], *ROWS[10:]]})
    with pytest.raises(UserError, match="split 'train' has 6 files; expected 2 as asked for"):
        build(tmp_path, {"train": ROWS}, shards=2)
    source = manifest.Source(manifest.read(pairs))
    with pytest.raises(UserError, match=r"\(list of 24 samples\); found .*pairs.jsonl: the first difference"):
        build(tmp_path, {"train": source})
    folder = build(tmp_path, {"train": source}, shards=2, overwrite=True)
    assert len(list(folder.glob("*array_record*"))) == 2 and record(folder)["train"]["source"] == str(pairs)


def test_splits_are_added_and_the_others_stay(tmp_path):
    build(tmp_path, {"train": ROWS[:8]})
    folder = build(tmp_path, {"test": ROWS[8:10]})
    assert len(dataset.read(folder, "train")) == 8 and len(dataset.read(folder, "test")) == 2
    build(tmp_path, {"test": ROWS[9:12]}, overwrite=True)
    assert len(dataset.read(folder, "train")) == 8 and len(dataset.read(folder, "test")) == 3
    assert build(tmp_path, {"train": ROWS[:8], "test": ROWS[9:12]}) == folder


def test_memory_is_flat(tmp_path):
    """Samples of 1 MB, 32 times what may be held."""
    class Large(list):
        def __getitem__(self, index):
            return drawn.Sample("t", "p", PNG + bytes(10**6), name=str(index))

    PNG = drawn.picture(drawn.np.random.default_rng(0), kind="BMP")
