import pickle

import numpy as np
import pytest

from acejax import UserError
from acejax.data.buckets import choose
from acejax.data.schedule import Stage
from acejax.data.stream import Broken, Stream, batch_sizes, collate
from tests.counts import count
from tests.data.test_buckets import draw_tokens

BUCKETS = (64, 128, 192, 256)
SIZES = {64: 8, 128: 4, 192: 4, 256: 2}


class Table:
    """Samples that are their own index; one in `broken` is broken."""

    tasks, datasets = ("a", "b", "c"), ("x", "y")

    def __init__(self, length: int, broken: int = 0, even: bool = False):
        rng = np.random.default_rng(0)
        self.tokens = np.repeat(BUCKETS, length // 4) if even else rng.integers(1, 257, length)
        self.references, self.task = rng.integers(0, 3, length), rng.integers(0, 3, length).astype(np.int32)
        self.dataset, self._broken = rng.integers(0, 2, length), broken

    def __len__(self):
        return len(self.tokens)

    def fetch(self, index, rng):
        if self._broken and index % self._broken == 0:
            raise Broken(f"picture {index}")
        tokens = int(self.tokens[index])
        return {"target": np.full((tokens, 2), index, np.float32), "positions": np.zeros((tokens, 3), np.int32),
                "unit": np.full(tokens, -1, np.int8), "index": np.int64(index), "drawn": np.float64(rng.random()),
                "task": self.task[index]}


def make(table, stages=(Stage(1),), **kwargs):
    return Stream(table, stages, BUCKETS, SIZES, seed=5, **kwargs)


def same(one, other):
    return (one.bucket, one.skipped) == (other.bucket, other.skipped) and one.arrays.keys() == other.arrays.keys() and \
        all(one.arrays[name].tobytes() == other.arrays[name].tobytes() for name in one.arrays)


def indices(stream, start, stop):
    return [int(i) for step in range(start, stop) for i in stream[step].arrays["index"]]


STAGES = (Stage(60, {"a": 1, "x/b": 2}, 0), Stage(40, {"x/*": 3, "c": 1}), Stage(1))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_stopped_anywhere_it_goes_on_as_it_would_have(workers):
    whole = make(Table(4000), STAGES)
    for start in np.random.default_rng(0).integers(0, 300, count(2, 10)):
        restored = pickle.loads(pickle.dumps(make(Table(4000), STAGES)))  # as in another process
        batches = list(restored.batches(int(start), int(start) + 200, workers=workers))
        assert len(batches) == 200
        assert all(same(batch, whole[int(start) + i]) for i, batch in enumerate(batches))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_is_each_sample_once(processes):
    table = Table(960, even=True)
    streams = [make(table).share((index,), processes) for index in range(processes)]
    steps = streams[0].schedule.epoch(0)
    assert steps == int(steps) == 240 / 8 + 240 / 4 + 240 / 4 + 240 / 2
    for epoch in range(2):
        span = (int(epoch * steps), int((epoch + 1) * steps))
        seen = [indices(stream, *span) for stream in streams]
        assert sorted(sum(seen, [])) == list(range(960))
        assert len(set(seen[0])) == 960 // processes, "disjoint"
    assert indices(streams[0], 0, 100) != indices(streams[0], int(steps), int(steps) + 100), "epochs differ in order"


def test_processes_have_the_same_shapes_and_their_own_rows():
    whole, *parts = [make(Table(4000), STAGES).share(*share) for share in (((0,), 1), ((0,), 2), ((1,), 2))]
    for step in range(0, 200, 3):
        batches = [part[step] for part in parts]
        assert len({batch.bucket for batch in batches}) == 1
        assert len({batch.arrays["target"].shape for batch in batches}) == 1
        for name, values in whole[step].arrays.items():
            np.testing.assert_array_equal(values, np.concatenate([batch.arrays[name] for batch in batches]))


def test_processes_that_read_ahead_in_workers_have_the_rows_of_one():
    whole, *parts = [make(Table(400), STAGES).share(*share) for share in (((0,), 1), ((0,), 2), ((1,), 2))]
    read = [list(part.batches(55, 65, workers=1)) for part in parts]
    for step, batches in zip(range(55, 65), zip(*read, strict=True), strict=True):
        for name, values in whole[step].arrays.items():
            np.testing.assert_array_equal(values, np.concatenate([batch.arrays[name] for batch in batches]))


def test_within_a_bucket_no_sample_is_seen_twice_before_all_are_seen():
    table = Table(1000)
    stream = make(table)
    seen: dict[int, list[int]] = {}
    for step in range(700):
        batch = stream[step]
        seen.setdefault(batch.bucket, []).extend(batch.arrays["index"].tolist())
    low = 0
    for bucket in BUCKETS:
        members = np.flatnonzero((table.tokens > low) & (table.tokens <= bucket))
        assert len(seen[bucket]) > len(members)
        for start in range(0, len(seen[bucket]) - len(members), len(members)):
            assert sorted(seen[bucket][start:start + len(members)]) == members.tolist()
        low = bucket


def test_stages_and_weights():
    table = Table(6000)
    stream = make(table, STAGES)
    first = np.array(indices(stream, 0, 60))
    kinds = {(int(table.task[i]), int(table.dataset[i])) for i in first}
    assert kinds == {(0, 0), (0, 1), (1, 0)} and not table.references[first].any()
    assert np.mean(table.task[first] == 0) == pytest.approx(1 / 3, abs=0.1)
    second = np.array(indices(stream, 60, 100))
    assert np.mean(table.dataset[second] == 0) == pytest.approx(3 / 4, abs=0.1)
    assert set(table.task[second][table.dataset[second] == 1]) == {2}
    assert {batch.bucket for batch in stream.batches(100, 200)} == set(BUCKETS), "the last stage goes on"
    assert set(stream.examples(0, 10)) <= set(BUCKETS) and set(stream.examples(90, 110)) == set(BUCKETS)


def test_few_samples_in_many_buckets_still_make_batches():
    assert set(indices(make(Table(5)), 0, 20)) == set(range(5))


def test_a_broken_sample_is_skipped_and_reported():
    stream = make(Table(4000, broken=40), max_broken=0.1)
    batches = list(stream.batches(0, 200))
    skipped = [line for batch in batches for line in batch.skipped]
    seen = [i for batch in batches for i in batch.arrays["index"]]
    assert 5 <= len(skipped) <= 60 and all(i % 40 for i in seen)
    assert len(seen) == sum(SIZES[batch.bucket] for batch in batches), "another one took its place"
    with pytest.raises(UserError, match=r"samples are broken, more than the share of 0\.001 .*; the last: .*picture"):
        list(make(Table(4000, broken=40), max_broken=0.001).batches(0, 200))
    with pytest.raises(UserError, match="20 samples one after the other are broken"):
        make(Table(40, broken=1))[0]


def test_padding():
    rows = [Table(8, even=True).fetch(index, np.random.default_rng(0)) for index in (0, 2)]
    batch = collate(rows, 192)
    assert batch["lengths"].tolist() == [64, 128] and batch["target"].shape == (2, 192, 2)
    assert (batch["unit"][0] == [-1] * 64 + [-2] * 128).all() and (batch["unit"][1] == [-1] * 128 + [-2] * 64).all()
    assert not batch["target"][0, 64:].any() and (batch["target"][1, :128] == 2).all()


def test_an_epoch_of_all_sizes_is_padded_little():
    """20,000 simulated sizes, half with a reference, at most 4,096 tokens: measured on the batches."""
    table = Table(count(1_000, 20_000))
    table.tokens = np.array(draw_tokens("canvas"))[:len(table)]
    chosen = choose(table.tokens)
    stream = Stream(table, [Stage(1)], chosen, batch_sizes(chosen, 32_768), seed=0)
    lengths = [(batch.bucket, batch.arrays["lengths"]) for batch in stream.batches(0, round(stream.schedule.epoch(0)))]
    waste = 1 - sum(length.sum() for _, length in lengths) / sum(bucket * len(length) for bucket, length in lengths)
    print(f"{waste:.2%} of an epoch's tokens are padding, in {len({bucket for bucket, _ in lengths})} shapes")
    assert waste <= 0.025 and len({bucket for bucket, _ in lengths}) <= 14


def test_batch_sizes_hold_the_tokens_and_fit_the_devices():
    assert batch_sizes((256, 512, 4096), 4096) == {256: 16, 512: 8, 4096: 1}
    assert batch_sizes((256, 4096), 32768, multiple=8) == {256: 128, 4096: 8}
    with pytest.raises(UserError, match="batch_tokens is 32768; expected at least 262144, a sample of 4096 tokens for"):
        batch_sizes([4096], 32768, 64)


@pytest.mark.parametrize("stages, message", [
    ([Stage(1, {"a": 1, "d": 1})], r"stage 1: no samples of 'd'; there are x/a, x/b, x/c, y/a"),
    ([Stage(1), Stage(1, {"a": -1})], "stage 2: the weight of 'a' is -1; expected 0 or more"),
    ([Stage(1, {"a": float("inf")})], "stage 1: the weight of 'a' is inf; expected 0 or more"),
    ([Stage(1, {"z/*": 1})], "no samples of 'z/\\*'"),
    ([Stage(1, {})], "stage 1 has no samples"),
    ([Stage(1, None, -1)], "stage 1 has no samples with at most -1 references"),
])
def test_stages_that_can_not_be_are_named(stages, message):
    with pytest.raises(UserError, match=message):
        make(Table(100), stages)


def test_tables_that_can_not_be():
    with pytest.raises(UserError, match="no sample to train on"):
        make(Table(0))
    table = Table(8)
    table.tokens[3] = 300
    with pytest.raises(UserError, match="a sample has 300 tokens; the greatest bucket is 256"):
        make(table)
