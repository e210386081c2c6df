"""The CLIP text encoder computes what transformers' computes, wherever the text ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax.model import clip
from acejax.model.config import CLIPConfig
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases, make
from tests.judges import difference

CONFIG, IDS = cases.clip_config(), cases.clip_ids()
# Compiling is nearly all that these tests cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
apply = jit(clip.apply, static_argnums=0, static_argnames="dtype")


@pytest.fixture(scope="module")
def params():
    return keymaps.from_foreign(CONFIG, cases.state(CONFIG, layout="hf").__getitem__, "hf")


def test_equals_the_recorded_clip(params):
    hidden, pooled = apply(CONFIG, params, IDS)
    with np.load(make.TEXT) as recorded:
        assert difference(hidden, recorded["clip_hidden"]) < 1e-4
        assert difference(pooled, recorded["clip_pooled"]) < 1e-4


@judges.needs_transformers
def test_equals_transformers():
    state = cases.state(CONFIG, seed=5, layout="hf")
    params = keymaps.from_foreign(CONFIG, state.__getitem__, "hf")
    for found, expected in zip(apply(CONFIG, params, IDS), judges.clip_features(CONFIG, state, IDS), strict=True):
        assert difference(found, expected) < 1e-4


def test_pooled_is_the_row_of_the_first_end(params):
    """What follows the first end token reaches neither that row nor the pooled feature: attention is causal."""
    hidden, pooled = apply(CONFIG, params, IDS)
    for row, at in enumerate((1, 5, 10, 11)):
        np.testing.assert_allclose(pooled[row], hidden[row, at], rtol=1e-6)  # one may be rounded in another fusion
    changed = IDS.copy()
    changed[1, 6:] = 0
    hidden_changed, pooled_changed = apply(CONFIG, params, changed)
    assert difference(pooled_changed, pooled) < 1e-5
    assert difference(hidden_changed[1, 6:], hidden[1, 6:]) > 1e-2


def test_vmap_and_gradient(params):
    def pooled(params, ids):
        return clip.apply(CONFIG, params, ids)[1]

    batched = jit(jax.vmap(lambda ids: pooled(params, ids[None])[0]))(IDS)
    assert difference(batched, apply(CONFIG, params, IDS)[1]) < 1e-5
    gradient = jit(jax.grad(lambda params: jnp.square(pooled(params, IDS)).mean()))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.asarray(leaf).any(), path  # every parameter takes part


def test_bfloat16_is_close(params):
    exact = np.asarray(apply(CONFIG, params, IDS)[1])
    found = apply(CONFIG, params, IDS, dtype=jnp.bfloat16)[1]
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found, np.float32) - exact).std() < 0.03 * exact.std()


def test_more_tokens_than_positions_are_named(params):
    with pytest.raises(ValueError, match="ids have 13 tokens, the config has 12 positions"):
        clip.apply(CONFIG, params, np.zeros((1, 13), np.int32))


@pytest.mark.parametrize(("change", "message"), [
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1; expected a positive number"),
    ({"hidden_size": 769}, "hidden_size 769 is not a multiple of num_attention_heads 12"),
])
def test_impossible_geometry_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**change)
