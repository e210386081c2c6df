"""A mask of another size than its image is a broken sample wherever samples are prepared."""

import dataclasses

import numpy as np
import pytest

from acejax import UserError
from acejax.data.augment import AugmentConfig
from acejax.data.build import build as build_dataset
from acejax.data.build import record
from acejax.data.layout import CanvasConfig
from acejax.data.prepare import plan
from tests.data.cached import build, png, samples

MESSAGE = r"mask of list\.jsonl:3 is 24 x 32 pixels \(width x height\); its picture is 48 x 64"


@pytest.fixture
def source():
    """Six samples; the mask of the third is half as large as its image."""
    made = samples(6)
    made[2] = dataclasses.replace(made[2], mask=png(9, 32, 24, 1))
    return made


def test_a_mask_of_another_size_is_not_stretched(source):
    for config in (CanvasConfig(), CanvasConfig(parity="reference")):
        with pytest.raises(UserError, match=MESSAGE):
            plan(source[2], config, AugmentConfig(), np.random.default_rng(0))


def test_features_leave_it_out(source, tmp_path):
    report, features = build(tmp_path, source, max_broken=0.5)
    assert len(features) == 5 and len(report.skipped) == 1
    with pytest.raises(UserError, match=MESSAGE):
        build(tmp_path, source, max_broken=0.1)


def test_a_dataset_leaves_it_out(source, tmp_path):
    with pytest.raises(UserError, match=MESSAGE):
        build_dataset(tmp_path / "stops", {"train": source}, workers=1)
    folder = build_dataset(tmp_path / "goes_on", {"train": source}, workers=1, skip_broken=True)
    assert record(folder)["train"]["records"] == 5
