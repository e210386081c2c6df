import numpy as np
import pytest

from acejax import UserError
from acejax.data.stream import Stage, Stream
from tests.train.small import make_stream


def same(one, other):
    return one[0] == other[0] and all(np.array_equal(one[1][name], other[1][name]) for name in one[1])


def test_a_batch_is_a_function_of_the_step():
    one, other = make_stream(), make_stream()
    late = [other[step] for step in (19, 12, 3)]
    assert all(same(one[step], batch) for step, batch in zip((19, 12, 3), late, strict=True))
    assert not same(one[12], one[13])


def test_stages_and_buckets():
    stream = make_stream()
    assert stream.tasks == ("a", "b", "r", "s") and stream.references == 2
    assert {stream[step][0] for step in range(10)} == {4}
    assert {stream[step][0] for step in range(10, 60)} == {4, 8, 12}, "the last stage goes on"
    assert set(stream.examples(0, 10)) == {4} and set(stream.examples(9, 20)) == {4, 8, 12}
    for step in range(8, 16):
        bucket, batch = stream[step]
        assert batch["target"].shape == (stream.batch_sizes[bucket], 4, bucket, 16)
        assert set(batch["task"]) <= ({0, 1} if bucket == 4 else {bucket // 4})


def test_every_sample_is_seen_once_before_any_is_seen_again_and_weights_hold():
    values = np.arange(2 * 48, dtype=np.float32).reshape(2, 48, 1, 1, 1)
    tables = {name: {"target": values[i], "unit": np.full((48, 1), -1, np.int8)} for i, name in enumerate("ab")}
    stream = Stream(tables, [Stage(1, {"a": 3, "b": 1})], {1: 8}, seed=0)
    rows = [(int(task), float(x)) for step in range(8) for task, x in zip(stream[step][1]["task"],
            stream[step][1]["target"].ravel(), strict=True)]
    seen = [x for task, x in rows if task == 0]
    assert len(seen) == 48 and len(set(seen)) == 48
    assert len(rows) == 64 and seen != sorted(seen)


def test_a_task_without_samples_is_named():
    with pytest.raises(UserError, match="no samples of c; it has a"):
        Stream({"a": {"target": np.zeros((1, 1, 1, 1)), "unit": np.zeros((1, 1))}}, [Stage(1, {"a": 1, "c": 1})], {}, 0)
