"""The pictures and the score of `acejax bench lora`; training takes minutes and is not repeated here."""

import numpy as np

from acejax.demo.evaluate import shuffled
from benchmarks.lora import Rows, accuracy, two_colours


def test_the_truth_has_both_colours_and_its_control_does_not():
    records = two_colours(12, 0, "test")
    targets = [record["target"] for record in records]
    assert len(records) == 12 and accuracy(targets, records) == 1.0
    assert accuracy([record["image"] for record in records], records) < 0.5
    other = [before["target"] for before in (records[-1], *records[:-1])]
    assert accuracy(other, records) < 0.5 and shuffled(records)[0]["prompt"] == records[1]["prompt"]
    for record in records:
        above, below = record["things"]
        article, first, _, second, shape = record["prompt"].split()
        assert (first, second, shape) == (above.color, below.color, above.shape) and above.color != below.color
        outside = record["mask"] == 0
        np.testing.assert_array_equal(record["target"][outside], record["image"][outside])


def test_training_samples_are_fixed_by_the_seed():
    one, again, other = Rows(3, 0), Rows(3, 0), Rows(3, 1)
    assert one[2] == again[2] and one[2].target != other[2].target and len(one) == 3
