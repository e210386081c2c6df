"""Learning rates against their formulas, AdamW against optax's own, Muon's matrices against a decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from acejax import UserError
from acejax.train.config import OptimizerConfig
from acejax.train.optimizer import dimension_numbers, learning_rate, make_optimizer


@pytest.mark.parametrize("schedule, halfway, end", [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)])
def test_schedules(schedule, halfway, end):
    rate = learning_rate(OptimizerConfig(3.0, schedule=schedule, warmup=0.1), 1000)
    np.testing.assert_allclose([rate(0), rate(50), rate(100), rate(550), rate(1000)],
                               [0, 1.5, 3, 3 * halfway, 3 * end], atol=1e-6)
    assert learning_rate(OptimizerConfig(3.0, schedule=schedule, warmup=0.0), 1000)(0) == 3


def test_cosine_is_the_released_codes():
    """ACE_plus: base (1 + cos(pi step / total)) / 2, no warm-up."""
    rate = learning_rate(OptimizerConfig(5e-5, warmup=0.0), 100_000)
    steps = np.arange(0, 100_001, 9_999)
    np.testing.assert_allclose(jax.vmap(rate)(steps), 5e-5 * (1 + np.cos(np.pi * steps / 1e5)) / 2, rtol=1e-4,
                               atol=1e-12)


def test_adamw_is_optaxs():
    config = OptimizerConfig(1e-2, warmup=0.2, eps=1e-6)
    ours = make_optimizer(config, 10)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
        learning_rate(config, 10), config.b1, config.b2, config.eps, weight_decay=config.weight_decay))
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    one, other, states = params, params, [ours.init(params), theirs.init(params)]
    for step in range(4):
        gradient = {"w": jax.random.normal(jax.random.key(step), (2, 3))}
        updates, states[0] = ours.update(gradient, states[0], one, step=step)
        one = optax.apply_updates(one, updates)
        updates, states[1] = theirs.update(gradient, states[1], other)
        other = optax.apply_updates(other, updates)
        np.testing.assert_allclose(one["w"], other["w"], rtol=1e-6)
    assert not np.array_equal(one["w"], params["w"])


def test_muon_turns_each_matrix_of_a_stack():
    """Whatever a matrix's gradient measures, its update has one size: layer by layer, query, key and value apart."""
    layers, features = 2, 16
    size = np.array([[1, 10, 100], [1000, 100, 10]], np.float32)  # of a layer's query, key and value
    shapes = {"qkv": {"kernel": (layers, features, 3, 2, 8), "bias": (layers, 3, 2, 8)},
              "mlp_out": {"kernel": (layers, 32, features)}}
    params = {"single_blocks": jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple)),
              "double_blocks": {"img": {"proj": {"kernel": jnp.ones((3, features, features))}}},
              "img_in": {"kernel": jnp.ones((features, features))}}
    optimizer = make_optimizer(OptimizerConfig(1.0, name="muon", weight_decay=0.0, schedule="constant", warmup=0.0), 1)
    gradient = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    gradient["single_blocks"]["qkv"]["kernel"] *= size[:, None, :, None, None]
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(gradient, state, params, step=jnp.int32(0))
    norms = np.linalg.norm(np.moveaxis(updates["single_blocks"]["qkv"]["kernel"], 2, 1).reshape(layers, 3, -1), axis=-1)
    np.testing.assert_allclose(norms, 0.2 * features, rtol=0.25)  # consistent with AdamW's root mean square, 0.2
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params["single_blocks"]) if leaf.ndim != 4)
    assert held == pytest.approx(kernels + 3 * features**2 + 2 * (layers * 48 + features**2), abs=50), \
        "one moment for what Muon turns"
    kinds = dimension_numbers(jax.tree.map(lambda stack: stack[0], params["single_blocks"]))
    assert kinds["qkv"]["bias"] is None and kinds["mlp_out"]["kernel"] == optax.contrib.MuonDimensionNumbers((0,), (1,))


@pytest.mark.parametrize("field, value, message", [
    ("name", "lion", "name is 'lion'; known: adamw, muon, adafactor"),
    ("schedule", "x", "schedule is 'x'; known: cosine, li"),
    ("warmup", 1.0, "warmup is 1.0; expected 0 or more, below 1"), ("clip", -1.0, "clip is -1.0; expected at least 0"),
    ("accumulate", 0, "accumulate is 0; expected at least 1")])
def test_what_cannot_be(field, value, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**{"learning_rate": 1.0, field: value})
