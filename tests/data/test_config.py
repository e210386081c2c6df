"""What is wrong with a config's data is said in one line, before anything is read or encoded."""

import functools
import io

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from acejax import UserError
from acejax.data import inputs
from acejax.data.config import DataConfig
from acejax.model.config import MMDiTConfig
from acejax.parallel.mesh import make_mesh
from configs.ace_plus import get_config
from tests.data.cached import Counting, samples

GONE = object()


def changed(place: str, value) -> ConfigDict:
    """configs/ace_plus.py with another value at a place, or none."""
    given = get_config().to_dict()
    *parts, last = place.split(".")
    part = functools.reduce(dict.__getitem__, parts, given)
    part[last] = value
    if value is GONE:
        del part[last]
    return ConfigDict(given)


def test_the_config_that_comes_with_acejax():
    data = DataConfig.of(get_config())
    assert [(stage.share, stage.references) for stage in data.stages] == [(0.5, 0), (0.5, None)]
    assert data.batches.batch_tokens == 65_536 and data.max_broken == 0.01
    inputs.check(data, make_mesh({"data": -1}))


HALF = {"share": 0.5}


@pytest.mark.parametrize("place, value, message", [
    ("seed", -1, "config.seed is -1; expected 0 or more"),
    ("seed", "x", "config.seed is 'x'; expected int"),
    ("data.max_brokn", 0.5, "config.data.max_brokn: no such field; expected sources, canvas, augment, max_broken, bu"),
    ("data.max_broken", "x", "config.data.max_broken is 'x'; expected a number"),
    ("data.max_broken", float("nan"), "config.data.max_broken is nan; expected a number"),
    ("data.canvas.reference_height", "ab", "config.data.canvas.reference_height is 'ab'; expected tuple[float, float]"),
    ("data.canvas.reference_height", ("a", "b"), "config.data.canvas.reference_height is ('a', 'b'); expected tuple"),
    ("data.canvas.scales", {"a": "x"}, "config.data.canvas.scales is {'a': 'x'}; expected Mapping[str, float]"),
    ("data.bucket_multiple", 0, "config.data.bucket_multiple is 0 and most_buckets 14; expected at least 1"),
    ("data.most_buckets", 0, "config.data.bucket_multiple is 256 and most_buckets 0; expected at least 1"),
    ("data.most_buckets", 1.5, "config.data.most_buckets is 1.5; expected int"),
    ("data.batch_tokens", -5, "config.data.batch_tokens is -5; expected 1 or more"),
    ("data.batch_tokens", GONE, "config.data.batch_tokens is missing; expected 1 or more"),
    ("data.batch_sizes", ((256,),), "config.data.batch_sizes is ((256,),); expected tuple[tuple[int, int], ...]"),
    ("data.batch_sizes", ((256, 0),), "config.data.batch_sizes is ((256, 0),); expected pairs (tokens, samples)"),
    ("stages", (), "config.stages is (); expected one or more"),
    ("stages", ("x",), "config.stages[0] is 'x'; expected fields"),
    ("stages", ({"share": "x"},), "config.stages[0].share is 'x'; expected a number"),
    ("stages", ({"weights": {"a": 1}},), "config.stages[0].share is missing"),
    ("stages", ({"share": -1.0}, {"share": 2.0}), "config.stages[0]: share is -1.0; expected above 0, up to 1"),
    ("stages", (HALF,), "config.stages: the shares are 0.5 together; expected 1"),
    ("stages", (HALF, HALF | {"weight": {}}), "config.stages[1].weight: no such field; expected share, weights, refer"),
    ("stages", (HALF, HALF | {"weights": {"a": "x"}}), "config.stages[1].weights is {'a': 'x'}; expected Mapping[str"),
    ("stages", (HALF, HALF | {"weights": {"a": float("inf")}}), "config.stages[1].weights is {'a': inf}; expected Map"),
    ("stages", (HALF, HALF | {"weights": {"a": -1}}), "config.stages[1]: weights is {'a': -1}; expected numbers of 0"),
    ("stages", (HALF, HALF | {"references": -1}), "config.stages[1]: references is -1; expected 0 or more, or None"),
    ("stages", (HALF, HALF | {"weights": {"his/*": 1}}), "config.stages[1].weights: 'his/*' is of no source; there ar"),
])
def test_a_wrong_field_is_named(place, value, message):
    with pytest.raises(UserError) as error:
        DataConfig.of(changed(place, value))
    assert str(error.value).startswith(message)


def test_lists_and_wholes_are_taken():
    data = DataConfig.of(changed("data.canvas", {"reference_height": [1, 1], "scales": {"a": 1}}))
    assert data.canvas.reference_height == (1, 1) and data.canvas.scales == {"a": 1}


@pytest.mark.parametrize("place, value, message", [
    ("stages", GONE, "config.stages is missing"),
    ("data.batch_tokens", 200, "data.batch_tokens is 200; expected at least 256, a sample of 256 tokens for each of 1"),
])
def test_batches_that_can_not_be_are_known_at_once(place, value, message):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(UserError, match=message):
        inputs.check(DataConfig.of(changed(place, value)), mesh)


def test_what_the_run_does_not_fit_is_known_before_it_is_encoded(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    (tmp_path / "list.jsonl").write_text('{"task": "one", "prompt": "p", "target": "a.png"}\n')
    counting = Counting()

    def features(weights, references=None, **model):
        given = get_config().to_dict()
        given["stages"] = ({"share": 1.0, "weights": weights, "references": references},)
        given["data"]["sources"] = {"mine": {"path": str(tmp_path / "list.jsonl")}}
        given["cache"]["dir"] = str(tmp_path / "cache")
        return inputs.make_features(DataConfig.of(ConfigDict(given)), None, encoders, MMDiTConfig.tiny(**model))

    encoders = counting.encoders()
    encoders = type(encoders)(**{**vars(encoders), "text_shape": (4, 8, 3)})
    with pytest.raises(UserError, match=r"config.stages\[0\]: no samples of 'two'; there are mine/one"):
        features({"one": 1, "two": 1}, context_in_dim=8, vec_in_dim=3)
    with pytest.raises(UserError, match="config.model.context_in_dim is 16; the text encoders give 8"):
        features({"one": 1}, context_in_dim=16, vec_in_dim=3)
    with pytest.raises(UserError, match="config.model.vec_in_dim is 16; the text encoders give 3"):
        features({"mine/*": 1}, context_in_dim=8, vec_in_dim=16)
    (tmp_path / "list.jsonl").write_text('{"task": "one", "prompt": "p", "target": "a.png", "references": ["a.png"]}\n')
    with pytest.raises(UserError, match=r"stages\[0\]: no samples of '\*' with at most 0 references; there are none"):
        features(None, 0)
    assert not counting.batches and not counting.prompts
    assert len(features({"one": 1}, context_in_dim=8, vec_in_dim=3)) == 1


def test_a_source_that_does_not_tell_its_tasks_may_have_any():
    inputs._check_stages(DataConfig.of(changed("stages", ({"share": 1, "weights": {"x": 1}},))).stages,
                         {"mine": samples(2)})
