"""Which features are whose: by settings, by content, and by what a source says of itself."""

import dataclasses
import pickle

import numpy as np
import pytest

from acejax import UserError
from acejax.data.augment import AugmentConfig
from acejax.data.cache import build as cache
from acejax.data.cache.features import Features
from acejax.data.layout import CanvasConfig
from tests.data.cached import AUGMENT, CANVAS, Counting, build, files, rng, samples, two


def test_several_datasets_are_one(tmp_path):
    config, encoders = cache.CacheConfig(str(tmp_path), "float32"), Counting().encoders()
    described = [cache.settings(name, {"path": name}, CANVAS, AUGMENT, encoders, config, 0) for name in ("one", "two")]
    indices = [cache.build(source, settings, CANVAS, AUGMENT, encoders, config).index
               for settings, source in zip(described, (samples()[2:4], samples()[:3]), strict=True)]
    features = Features(tmp_path, indices)
    assert len(features) == 5 and features.datasets == ("one", "two") and features.dataset.tolist() == [0, 0, 1, 1, 1]
    assert [features.tasks[task] for task in features.task] == ["local", "free", "text", "edit", "local"]
    assert [features.tasks[features.fetch(i, rng())["task"]] for i in range(5)] == [
        "local", "free", "text", "edit", "local"]
    np.testing.assert_array_equal(features.fetch(0, rng())["edit"], features.fetch(4, rng())["edit"])


def test_other_data_of_the_same_settings_gets_features_of_its_own(tmp_path):
    first, features = build(tmp_path, samples())
    second, others = build(tmp_path, samples(12)[6:])
    assert first.index != second.index and features.digest != others.digest
    again = pickle.loads(pickle.dumps(features))
    assert again.digest == features.digest == build(tmp_path, samples())[1].digest
    np.testing.assert_array_equal(again.fetch(0, rng())["target"], features.fetch(0, rng())["target"])
    assert build(tmp_path / "elsewhere", samples())[1].digest == features.digest
    captions = [dataclasses.replace(sample, prompt="other") for sample in samples()]
    assert build(tmp_path, captions)[1].digest != features.digest
    pickled = pickle.dumps(features)
    first.index.write_bytes(second.index.read_bytes())
    with pytest.raises(UserError, match=r"the features of list are others than those that were opened before"):
        pickle.loads(pickled)


class Told(list):
    """Samples that say of themselves which they are, and count how often they are read."""

    def __init__(self, given, identity="a"):
        super().__init__(given)
        self.identity, self.read = lambda: identity, 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def test_an_unchanged_source_is_not_read_again(tmp_path, capsys):
    first, features = build(tmp_path, Told(samples()))
    before = files(tmp_path)
    capsys.readouterr()
    report, again = build(tmp_path, source := Told(samples()))
    assert not source.read and files(tmp_path) == before and again.digest == features.digest
    assert report == dataclasses.replace(first, tiles_encoded=0, prompts_encoded=0, nbytes=0, seconds=report.seconds)
    assert capsys.readouterr().out == ("list: 6 samples, unchanged since they were encoded; `acejax data cache "
                                       "--recheck` reads them again\n")
    for changes in ({"recheck": True}, {"seed": 1}, {"augment": AugmentConfig(drop_caption=0.1)}, {"batch": 2},
                    {"clean": str.title}, {"name": "other"}):
        build(tmp_path, source := Told(samples()), **changes)
        assert (source.read == 0) == (changes == {"batch": 2}), changes
    build(tmp_path, source := Told(samples(), "b"))
    assert source.read
    for shard in (tmp_path / "shards").iterdir():
        shard.unlink()
    report, _ = build(tmp_path, source := Told(samples(), "b"))
    assert source.read and report.tiles_encoded == report.tiles


def test_an_unchanged_source_has_as_many_broken_samples_as_before(tmp_path):
    source = samples()
    source[1] = dataclasses.replace(source[1], target=b"no picture")
    first, _ = build(tmp_path, Told(source), max_broken=0.2)
    again, _ = build(tmp_path, Told(source), max_broken=0.2)
    assert again.skipped == first.skipped and len(again.skipped) == 1
    with pytest.raises(UserError, match="1 of 6 samples are broken"):
        build(tmp_path, Told(source), max_broken=0.1)


def test_processes_hear_that_a_source_is_unchanged(tmp_path):
    source = Told(samples())
    build(tmp_path, source)
    source.read = 0
    (one, features), (other, _) = two(tmp_path, source)
    assert one.index == other.index and not source.read and len(features) == 6


def test_what_differs_from_the_nearest_features_is_told(tmp_path, capsys):
    build(tmp_path, samples(), canvas=CanvasConfig(max_tokens=8), dtype="bfloat16", seed=3)
    build(tmp_path, samples())
    assert "anew" in capsys.readouterr().out
    build(tmp_path, samples(12))
    assert "anew" not in capsys.readouterr().out, "the same settings"
    build(tmp_path, samples(), canvas=CanvasConfig(max_tokens=12), name="another")
    assert ("  encoding anew because autoencoder is 'another', was 'counting'; canvas.max_tokens is 12, was 16\n"
            in capsys.readouterr().out)


def test_a_cache_of_nothing(tmp_path):
    report, features = build(tmp_path, [])
    assert report.tiles == 0 and len(features) == 0
