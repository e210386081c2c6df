"""Building a dataset: in parallel, cut off and gone on with, and every mistake in one message."""

import dataclasses
import fcntl
import json
import pathlib
import resource
import time
from collections.abc import Sequence

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
    assert f"{folder}, split train: 24 samples in 6 files" in said and "as_data_source('train')" in said
    assert report["wrote_samples"] == report["records"] == 24 and report["skipped"] == []
    assert data_build.main(["--data_dir", str(tmp_path / "out"), str(pairs)]) == 0
    assert "was there already" in capsys.readouterr().out
    rows = dataset.read(folder, "train")
    assert [row.prompt for row in rows] == [row.prompt for row in ROWS]


@pytest.mark.soak
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
    assert len(list(folder.glob("*array_record*"))) == 3
    calls = []
    build(tmp_path, {"train": source}, shards=6, progress=lambda *told: calls.append(told))
    assert calls[0] == ("train", 12, 24, 0) and calls[-1][:3] == ("train", 24, 24)
    assert files(folder) == whole
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
    assert "21 samples in 3 files" in said and "left out 3 samples" in said
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


def test_a_bucket(bucket, whole, pairs, tmp_path, monkeypatch):
    """array_record reads gs:// by itself, in the cloud alone; here what was copied there is compared."""
    source = manifest.Source(manifest.read(pairs))
    told = []
    monkeypatch.setattr(shards.shutil, "copyfileobj", refuse_after(3))
    with pytest.raises(UserError, match="train.array_record-00003-of-00006: cannot be written .the network is gone"):
        build(bucket, {"train": source}, shards=6)
    monkeypatch.undo()
    folder = build(bucket, {"train": source}, shards=6, progress=lambda *now: told.append(now))
    assert str(folder) == "gs://pictures/condition_units/1.0.0" and told[0][1] == 12
    assert files(folder) == whole


def refuse_after(times, copy=shards.shutil.copyfileobj):
    left = [times]

    def copyfileobj(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the network is gone")
        return copy(*args)
    return copyfileobj


def limited_build(data_dir, megabytes, answer):
    """A disk that is full after some bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, megabytes << 20))
    try:
        build(data_dir, {"train": [drawn.Sample("t", "p", LARGE, name="large")] * 10}, shards=2)
    except UserError as error:
        answer.put(str(error))


LARGE = drawn.picture(drawn.np.random.default_rng(0), 900, 900)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    context = shards._context()
    answer = context.Queue()
    run = context.Process(target=limited_build, args=(tmp_path, 1, answer))
    run.start()
    assert "array_record-00000-of-00002: cannot be written (" in (said := answer.get(timeout=60)), said
    assert "the same command goes on" in said and "\n" not in said and "oo large" in said
    run.join()
    assert not list(tmp_path.rglob("*.part"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x/condition_units/1.0.0: cannot be written \(Not a directory\)"):
        build(tmp_path / "file" / "x", {"train": ROWS})


def memory_build(data_dir, number, answer):
    """Build from `number` samples of half a megabyte; the most memory held after the first 20 and at the end."""
    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    held = []
    build(data_dir, {"train": Large(number)}, shards=2, progress=lambda *_: held.append(resident()))
    answer.put((max(held[:20]), max(held)))


class Large(Sequence):
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return drawn.Sample("t", "p", LARGE, LARGE[:], name=str(index))

    def fingerprint(self, index):
        return str(index)


def test_memory_is_flat(tmp_path):
    context = shards._context()
    answer = context.Queue()
    run = context.Process(target=memory_build, args=(tmp_path, count(60, 3000), answer))
    run.start()
    early, most = answer.get(timeout=300)
    run.join()
    assert most - early < 40e6, f"{early / 1e6:.0f} MB grew to {most / 1e6:.0f} MB"


def test_wrong_arguments_are_named(pairs, tmp_path):
    for name, value, message in (
            ("data_dir", "s3://bucket", "array_record reads local disks and gs:// only"),
            ("name", "Mine", "name 'Mine': expected small letters"), ("version", "1", "version '1': expected three"),
            ("split", "a/b", "split 'a/b': expected letters"), ("split", "all", "split 'all'"),
            ("workers", "0", "--workers=0"), ("shards", "0", "--shards=0: expected at least 1"),
            ("json", f"{tmp_path}/no/f.json", "its folder is not there")):
        with pytest.raises(UserError, match=message):
            data_build.main([str(pairs), f"--data_dir={tmp_path}", f"--{name}={value}"])
    with pytest.raises(UserError, match="split 'train': no samples in its source"):
        build(tmp_path, {"train": []})
    with pytest.raises(UserError, match="a source that cannot be pickled .* workers=1"):
        build(tmp_path, {"train": type("Mine", (list,), {})(ROWS)}, shards=3, workers=2)
    with pytest.raises(UserError, match="pairs:1: text that is no valid unicode"):
        build(tmp_path / "u", {"train": [dataclasses.replace(ROWS[0], prompt="\ud83d")]})


def test_two_builds_at_once_are_refused(tmp_path):
    folder = build(tmp_path, {"train": ROWS[:2]})
    (folder / BUILDING).mkdir()
    with (folder / BUILDING / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build is at work there"):
            build(tmp_path, {"test": ROWS[:2]})
    assert len(dataset.read(folder)) == 2


def test_a_dataset_of_another_program_is_left_alone(tmp_path):
    folder = build(tmp_path, {"train": ROWS[:2]})
    (folder / "acejax_build.json").unlink()
    with pytest.raises(UserError, match="is there already, and was not built by acejax"):
        build(tmp_path, {"train": ROWS[:2]})
    features = folder / "features.json"
    features.write_text(features.read_text().replace("references", "others"))
    with pytest.raises(UserError, match="a TFDS dataset with other features is there"):
        build(tmp_path, {"test": ROWS[:2]})
    assert len(list(folder.glob("*array_record*"))) == 1
