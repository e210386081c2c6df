"""Samples decoded while training goes on, through the stream: broken ones, and what is drawn anew at each step."""

import dataclasses

import numpy as np
import pytest

from acejax import UserError
from acejax.data.augment import AugmentConfig
from acejax.data.layout import CanvasConfig
from acejax.data.online import Pictures
from acejax.data.sample import Sample
from acejax.data.schedule import Stage
from acejax.data.stream import Stream
from tests.data.cached import samples
from tests.data.drawn import picture

CANVAS = CanvasConfig(max_tokens=16)


def jpegs(count: int, broken: set[int], unread: set[int] = frozenset()) -> list[Sample]:
    """Of two shapes; `broken` have a good header and are cut off, `unread` have none."""
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        data = picture(rng, 48, 48 + 16 * (number % 2))
        data = data[:len(data) // 2] if number in broken else b"nothing" if number in unread else data
        made.append(Sample("text", f"prompt {number}", data, name=f"list:{number}"))
    return made


def stream(table: Pictures, max_broken: float = 0.2) -> Stream:
    buckets = sorted({int(count) for count in table.tokens})
    return Stream(table, [Stage(1)], buckets, dict.fromkeys(buckets, 4), seed=3, max_broken=max_broken)


def test_broken_pictures_are_skipped_counted_and_reported():
    broken = set(range(0, 60, 12))
    table = Pictures(jpegs(60, broken, {1, 2}), CANVAS)
    assert len(table) == 58 and [line.split(":")[0] for line in table.skipped] == ["picture target of list"] * 2
    batches = list(stream(table).batches(0, 60))
    seen = {prompt for batch in batches for prompt in batch.arrays["prompt"]}
    assert seen == {f"prompt {number}" for number in set(range(60)) - broken - {1, 2}}
    assert all(len(batch.arrays["canvas"]) == 4 for batch in batches), "another one takes the place"
    told = [line for batch in batches for line in batch.skipped]
    assert {line.partition("list:")[2].partition(":")[0] for line in told} == {str(number) for number in broken}


def test_too_many_broken_pictures_stop_the_run():
    table = Pictures(jpegs(60, set(range(0, 60, 12))), CANVAS)
    with pytest.raises(UserError, match=r"of \d+ samples are broken, more than the share of 0.01 .*target of list:"):
        list(stream(table, 0.01).batches(0, 60))


def test_a_step_draws_the_same_whenever_it_is_asked_for():
    made = [dataclasses.replace(sample, mask=None) for sample in samples(60) if sample.image]
    table = Pictures(made, CANVAS, AugmentConfig(drop_caption=0.5, full_mask=0.3, random_mask=0.5))
    one, again = stream(table), stream(Pictures(made, CANVAS, AugmentConfig(0.5, 0.3, 0.5)))
    masks: dict[str, set[bytes]] = {}
    for step in range(40):
        first, second = one[step].arrays, again[step].arrays
        assert first["prompt"] == second["prompt"]
        for canvas, other in zip(first["canvas"], second["canvas"], strict=True):
            for field in ("source", "mask", "target", "present"):
                np.testing.assert_array_equal(getattr(canvas, field), getattr(other, field))
            masks.setdefault(canvas.target.tobytes(), set()).add(canvas.mask.tobytes())
    prompts = [prompt for step in range(40) for prompt in one[step].arrays["prompt"]]
    assert 0.3 < np.mean([prompt == "" for prompt in prompts]) < 0.7
    assert any(len(found) > 2 for found in masks.values()), "another visit draws another mask"
