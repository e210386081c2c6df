"""The cache's files: found by key, whole or not at all, missed where they are gone, on a disk or in a bucket."""

import concurrent.futures
import dataclasses
import os
import pickle
import time

import numpy as np
import pytest

from acejax import UserError
from acejax.data import pictures, written
from acejax.data.cache import store
from tests.data.cached import build, files, rng, samples


def test_what_killed_runs_left_is_removed_and_no_other_runs(tmp_path):
    build(tmp_path, samples())
    (tmp_path / "told").mkdir()
    left = [".weights.json.17-a.part", "shards/.a.safetensors.17-a.part", "index/.a.17-a.part", "told/a.0.safetensors"]
    for place in left:
        for name in (place, f"{place[:-len(place.split('.')[-1]) - 1]}-young.{place.split('.')[-1]}"):
            (tmp_path / name).write_bytes(b"torn")
        os.utime(tmp_path / place, (time.time() - 4000,) * 2)
    before = files(tmp_path)
    build(tmp_path, samples())
    assert set(before) - set(files(tmp_path)) == set(left)


def test_two_writers_of_one_file(tmp_path):
    def write(number):
        for _ in range(50):
            written.write(tmp_path / "weights.json", bytes([number]) * 100_000)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.json"]
    assert len(set((tmp_path / "weights.json").read_bytes())) == 1


def test_a_damaged_or_missing_shard_is_named(tmp_path):
    _, features = build(tmp_path, samples())
    shards = sorted((tmp_path / "shards").iterdir(), key=lambda path: path.stat().st_size)
    data = shards[-1].read_bytes()
    shards[-1].write_bytes(data[:-100])
    with pytest.raises(UserError, match=rf"{shards[-1].name}: cut short .*; remove it and run `acejax data cache` ag"):
        build(tmp_path, samples())
    shards[-1].unlink()
    with pytest.raises(UserError, match="no such file; run `acejax data cache` again"):
        for index in range(6):
            features.fetch(index, rng())
    report, again = build(tmp_path, samples())
    assert report.tiles_encoded > 0
    assert shards[-1].read_bytes() == data, "the same rows come back"
    for index in range(6):
        again.fetch(index, rng())


def test_a_store_finds_every_key_and_no_other(tmp_path):
    made = store.Store(tmp_path)
    draw = np.random.default_rng(0)
    keys = [bytes(draw.integers(0, 3, 16, np.uint8)) for _ in range(300)]  # many zeros, at the ends as well
    keys = list(dict.fromkeys(key for key in keys if any(key)))
    rows = [(key, draw.standard_normal((2, 3)).astype(np.float32)) for key in keys]
    made.add({"a.2x3": rows[:100]})
    made.add({"a.2x3": rows[100:200], "b.1": [(key, np.array([7], np.uint8)) for key, _ in rows[200:]]})
    table = made.table()
    found = table.find(np.frombuffer(b"".join(keys), store.KEY))
    assert (found >= 0).all() and len(set(found.tolist())) == len(keys)
    assert table.find(np.frombuffer(bytes([9] * 16) + bytes([0] * 15 + [9]), store.KEY)).tolist() == [-1, -1]
    reader = store.Reader(tmp_path)
    for (_, row), at in zip(rows[:200], found[:200], strict=True):
        read = reader.read(table.shards[table.shard[at]], int(table.start[at]), (2, 3), np.dtype(np.float32))
        np.testing.assert_array_equal(read, row)
    assert {table.kinds[kind] for kind in table.kind[found[200:]]} == {"b.1"}


@pytest.mark.parametrize("kind, missing", [("latents", "tiles"), ("text", "prompts")])
def test_features_that_vanish_while_they_are_made_are_missed(tmp_path, monkeypatch, kind, missing):
    table = store.Store.table

    def without(self, *names):
        found = table(self, *names)
        kept = np.array([not found.kinds[one].startswith(kind) for one in found.kind], bool)
        return found._replace(**{name: getattr(found, name)[kept] for name in ("keys", "shard", "start", "kind")})

    monkeypatch.setattr(store.Store, "table", without)
    with pytest.raises(UserError, match=rf"shards of 'list' are gone .*\d {missing} without a place"):
        build(tmp_path, samples())
    assert not (tmp_path / "index").exists()


def test_cache_and_pictures_in_a_bucket(bucket, tmp_path):
    """gs:// through fsspec: nothing of it needs a local file."""
    names = []
    for number, sample in enumerate(samples()):
        (bucket / f"{number}.png").write_bytes(sample.target)
        names.append(dataclasses.replace(sample, target=pictures.read(f"gs://pictures/{number}.png")))
    report, features = build("gs://pictures/cache", names)
    assert str(report.index).startswith("gs://pictures/cache/index/list-")
    again, _ = build("gs://pictures/cache", names)
    assert again.tiles_encoded == again.prompts_encoded == 0
    _, local = build(tmp_path, samples())
    for index in range(6):
        row, expected = features.fetch(index, rng()), local.fetch(index, rng())
        assert all(np.array_equal(row[name], expected[name]) for name in expected)
    copy = pickle.loads(pickle.dumps(features))
    assert np.array_equal(copy.fetch(3, rng())["edit"], features.fetch(3, rng())["edit"])
