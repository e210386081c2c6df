"""The T5 encoder computes what transformers' computes, pads among the tokens, near and far."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax.model import t5
from acejax.model.config import T5Config
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases, make
from tests.judges import difference

CONFIG, IDS = cases.t5_config(), cases.t5_ids()
# Compiling is nearly all that these tests cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
apply = jit(t5.apply, static_argnums=0, static_argnames="dtype")


@pytest.fixture(scope="module")
def params():
    return keymaps.from_foreign(CONFIG, cases.state(CONFIG, layout="hf").__getitem__, "hf")


def test_equals_the_recorded_t5(params):
    with np.load(make.TEXT) as recorded:
        assert difference(apply(CONFIG, params, IDS), recorded["t5"]) < 1e-4


@judges.needs_transformers
def test_equals_transformers():
    state = cases.state(CONFIG, seed=5, layout="hf")
    params = keymaps.from_foreign(CONFIG, state.__getitem__, "hf")
    assert difference(apply(CONFIG, params, IDS), judges.t5_features(CONFIG, state, IDS)) < 1e-4


@judges.needs_transformers
def test_recorded_text_features_are_current():
    made = make.text()
    with np.load(make.TEXT) as recorded:
        assert recorded.keys() == made.keys()
        for key, features in made.items():
            assert difference(recorded[key], features) < 1e-5, key


def test_buckets_of_every_distance():
    """With 32 buckets and 128 tokens the logarithm is floor(log2((distance / 8)^2)): whole numbers, no rounding."""
    buckets = t5.buckets(T5Config(), 512)
    for distance in range(512):
        far = 8 + (distance**2 // 64).bit_length() - 1
        expected = distance if distance < 8 else min(15, far)
        assert buckets[distance, 0] == expected  # the key lies before the query
        assert buckets[0, distance] == expected + 16 * (distance > 0)


def test_vmap_and_gradient(params):
    batched = jit(jax.vmap(lambda ids: t5.apply(CONFIG, params, ids[None])[0]))(IDS)
    assert difference(batched, apply(CONFIG, params, IDS)) < 1e-5
    gradient = jit(jax.grad(lambda params: jnp.square(t5.apply(CONFIG, params, IDS)).mean()))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.asarray(leaf).any(), path  # every parameter takes part


def test_bfloat16_is_close(params):
    exact = np.asarray(apply(CONFIG, params, IDS))
    found = apply(CONFIG, params, IDS, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found, np.float32) - exact).std() < 0.03 * exact.std()


def test_depth_does_not_grow_the_program():
    """Scanned: one body however many layers; XXL has 24."""
    def lines(layers):
        config = dataclasses.replace(CONFIG, num_layers=layers)
        params = jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
        return jax.jit(t5.apply, static_argnums=0).lower(config, params, IDS).as_text().count("\n")

    assert lines(2) == lines(9)


@pytest.mark.parametrize(("change", "message"), [
    ({"d_kv": 0}, "d_kv is 0; expected a positive number"),
    ({"relative_attention_num_buckets": 30}, "is 30; expected a multiple of 4"),
    ({"relative_attention_max_distance": 8}, "is 8; expected more than 8"),
])
def test_impossible_geometry_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**change)
