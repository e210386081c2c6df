"""What a plan finds out about one's own data, from the cache and from a manifest."""

import dataclasses
import pathlib
import runpy

import numpy as np
import pytest

from acejax.cli.config import folder
from acejax.data import check, manifest
from acejax.data.cache import build as cache
from acejax.data.cache.features import Features
from acejax.data.config import DataConfig
from acejax.errors import UserError
from acejax.train import plan_data
from tests.data import drawn
from tests.data.cached import Counting


@pytest.fixture
def config(tmp_path):
    """A config over seven samples that lie in a folder, with a cache that is not there yet."""
    made = runpy.run_path(str(folder() / "ace_plus.py"))["get_config"]()
    made.data.sources.mine.path = str(drawn.write(tmp_path / "pairs", drawn.samples(7)))
    made.data.canvas.max_tokens = 64
    made.cache.dir = str(tmp_path / "cache")
    return made


def encode(config) -> Features:
    """The features of the config's data, by encoders that cost nothing."""
    data = DataConfig.of(config)
    encoders = Counting().encoders()
    source = data.sources["mine"]
    settings = cache.settings("mine", dataclasses.asdict(source), data.canvas, data.augment, encoders, data.cache, 0)
    report = cache.build(source.open(), settings, data.canvas, data.augment, encoders, data.cache, threads=1)
    return Features(data.cache.dir, [report.index])


def test_a_manifest_tells_samples_and_tokens(config):
    found = plan_data.find(config)
    told = check.check(manifest.read(config.data.sources.mine.path), DataConfig.of(config).canvas)
    assert found.count == 7 and found.origin == "the manifest" and found.cached == 0
    np.testing.assert_array_equal(found.tokens, told.tokens)
    assert found.total == told.tokens.sum()


def test_of_a_long_manifest_some_lines_stand_for_all(config, monkeypatch):
    monkeypatch.setattr(plan_data, "HEADERS", 3)
    found = plan_data.find(config)
    assert found.count == len(found.tokens) == 7
    assert found.origin == "the manifest, by 3 of its samples"


def test_the_cache_comes_first(config):
    features = encode(config)
    found = plan_data.find(config)
    assert found.count == 7 and found.origin == "the feature cache"
    np.testing.assert_array_equal(found.tokens, features.tokens)
    assert found.cached == sum(path.stat().st_size for path in pathlib.Path(config.cache.dir, "shards").iterdir())


@pytest.mark.parametrize("change", ["canvas", "path", "name"])
def test_features_of_something_else_are_not_taken(config, change, tmp_path):
    encode(config)
    if change == "canvas":
        config.data.canvas.max_tokens = 32
    elif change == "path":
        config.data.sources.mine.path = str(drawn.write(tmp_path / "others", drawn.samples(5)))
    else:
        config.data.sources = {"yours": config.data.sources.mine.to_dict()}
    assert plan_data.find(config).origin == "the manifest"


def test_several_sources_are_added_up(config, tmp_path):
    more = str(drawn.write(tmp_path / "more", drawn.samples(5, seed=1)))
    config.data.sources = {"mine": config.data.sources.mine.to_dict(), "more": {"path": more, "split": "train"}}
    found = plan_data.find(config)
    assert found.count == len(found.tokens) == 12


def test_what_is_not_there_is_told(config):
    config.data.sources.mine.path = "nosuch.jsonl"
    with pytest.raises(UserError, match="nosuch.jsonl: no such file or folder"):
        plan_data.find(config)
