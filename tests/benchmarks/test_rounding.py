"""The pictures, the count and the verdict of `acejax bench rounding`; its training takes minutes, not repeated here."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from acejax.demo.pictures import samples
from benchmarks.rounding import Negatives, identical, judged


def test_pictures_are_negatives_and_masks_are_not():
    rows = Negatives(("text", "insert"), 2, 0, 80, (1.5, 2.0))
    drawn = [one for task in ("text", "insert") for one in samples(2, task, 0, "train", 80, (1.5, 2.0))]
    assert len(rows) == 4 and len({rows.fingerprint(index) for index in range(4)}) == 4
    for row, one in zip(rows, drawn, strict=True):
        assert (row.task, row.prompt) == (one.task, one.prompt)
        for found, picture in ((row.target, 255 - one.target), (row.mask, one.mask),
                               (row.image, None if one.image is None else 255 - one.image)):
            assert (found is None) == (picture is None)
            if found is not None:
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found))), picture)


def test_weights_are_compared_in_bfloat16():
    before = {"a": jnp.array([1.0, -2.0, 0.0]), "b": jnp.array([4.0])}
    assert identical(before, before) == 1
    below = {"a": before["a"] * (1 + 2**-10), "b": before["b"] * (1 + 2**-6)}  # a step is 2^-7 of them
    assert identical(before, below) == 0.75
    low = {name: leaf.astype(jnp.bfloat16) for name, leaf in before.items()}
    assert identical(low, below) == 0.75


@pytest.mark.parametrize(("change", "missed"), [
    ({}, []),
    ({"stochastic": {"loss": 2.2}}, [r"stochastic ends +10.0% from float32, expected within 5%"]),
    ({"stochastic": {"loss": 1.8}}, [r"stochastic ends -10.0%"]),
    ({"nearest": {"identical": 0.4}}, ["nearest leaves 40.0% of the weights as they were, expected 50% or more"]),
    ({name: {"loss_before": 2.05} for name in ("float32", "stochastic", "nearest")}, ["float32 goes from 2.0500"]),
    ({"nearest": {"loss_before": 3.1}}, ["the runs start at different losses"]),
])
def test_what_is_missed_is_told(change, missed):
    runs = {"float32": {"loss_before": 3.0, "loss": 2.0, "identical": 0.3},
            "stochastic": {"loss_before": 3.0, "loss": 2.02, "identical": 0.2},
            "nearest": {"loss_before": 3.0, "loss": 2.9, "identical": 0.9}}
    found = judged({name: run | change.get(name, {}) for name, run in runs.items()})
    assert len(found["missed"]) == len(missed)
    assert all(line.startswith(start) for line, start in zip(found["missed"], missed, strict=True))
    if not change:
        assert found["runs"]["nearest"]["drop_over_float32"] == pytest.approx(0.1)
        assert found["runs"]["stochastic"]["loss_over_float32"] == pytest.approx(1.01)
