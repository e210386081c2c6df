"""Adafactor against optax's on each layer, rounding against exact expectations, and what a config may not ask for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from acejax import UserError
from acejax.train import stacks
from acejax.train.adafactor import Adafactor, keys, stochastic_round
from acejax.train.config import OptimizerConfig, TrainConfig
from tests.train.small import make_config

RATE = 1e-2
PLAIN = Adafactor(lambda step: RATE, weight_decay=0.0, clip=0.0, stochastic=True)


def trees(dtype, steps: int = 1):
    """Parameters of stacks and of a rest, and a gradient for each step; layers differ a thousandfold."""
    shapes = {"double_blocks": {"kernel": (2, 128, 3, 130), "bias": (2, 5)}, "single_blocks": {"kernel": (3, 7, 9)},
              "img_in": {"kernel": (128, 129)}}
    rng = np.random.default_rng(0)

    def draw(shape):
        scale = 1000.0 ** -(np.arange(shape[0]) % 3)
        return jnp.asarray(rng.standard_normal(shape) * scale.reshape(-1, *[1] * (len(shape) - 1)), dtype)

    drawn = [jax.tree.map(draw, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)) for _ in range(steps + 1)]
    return drawn[0], drawn[1:]


def run(optimizer, params, gradients, good=True):
    state, apply = optimizer.init(params), jax.jit(optimizer.apply)
    for step, gradient in enumerate(gradients):
        norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient))
        params, state = apply(gradient, state, params, keys(7, step), step, norm, good)
    return params, state


def test_each_layer_is_as_by_itself():
    """A stack's layers against optax.adafactor on each layer alone, weight decay and clipping of the norm included."""
    params, gradients = trees(jnp.float32, 3)
    optimizer = dataclasses.replace(PLAIN, weight_decay=0.1, clip=0.5)
    ours, _ = run(optimizer, params, gradients)
    theirs = optax.adafactor(RATE, multiply_by_parameter_scale=False, weight_decay_rate=RATE * 0.1)
    for name in params:
        for layer in range(stacks.length(params[name])) if name in stacks.STACKS else [slice(None)]:
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params[name])
            state = theirs.init(one)
            for gradient in gradients:
                scale = min(1.0, 0.5 / optax.tree.norm(gradient))
                gradient = jax.tree.map(lambda leaf, layer=layer, scale=scale: scale * leaf[layer], gradient[name])
                update, state = theirs.update(gradient, state, one)
                one = optax.apply_updates(one, update)
            jax.tree.map(lambda got, wanted, layer=layer: np.testing.assert_allclose(got[layer], wanted, rtol=1e-5,
                                                                                     atol=1e-7), ours[name], one)


def test_moments_are_small_and_float32():
    params, gradients = trees(jnp.bfloat16)
    _, state = run(PLAIN, params, gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    moments = state["double_blocks"][0]
    assert {moments.v_row["kernel"].shape, moments.v_col["kernel"].shape} == {(2, 128, 3), (2, 3, 130)}
    assert moments.v["bias"].shape == (2, 5)


def test_what_is_not_good_changes_nothing():
    params, gradients = trees(jnp.bfloat16)
    after, state = run(PLAIN, params, gradients, good=False)
    jax.tree.map(np.testing.assert_array_equal, (after, state), (params, PLAIN.init(params)))


@pytest.mark.parametrize("x", [1.0, -1.003, 3.14159, 1e-30, -7e20, 0.0])
def test_rounding_is_exact_in_the_mean(x):
    """Over all 65,536 draws: no other values than the two neighbours, and their mean is x."""
    rounded = stochastic_round(jnp.float32(x), jnp.arange(2**16, dtype=jnp.uint16))
    assert rounded.dtype == jnp.bfloat16 and len(set(np.asarray(rounded, np.float64))) <= 2
    assert np.asarray(rounded, np.float64).mean() == np.float64(np.float32(x))


def test_a_quadratic_in_bfloat16_has_the_mean_of_one_in_float32():
    """x - 1e-3 (x - 0.5) from 1 on: the mean of all copies goes the exact way; to the nearest, none moves at all."""
    copies, steps, rate = 2**16, 100, 1e-3

    def one(step, x):
        wide = x.astype(jnp.float32)
        bits = jax.random.bits(keys(0, step)["rest"], x.shape, jnp.uint16)
        return stochastic_round(wide - rate * (wide - 0.5), bits)

    x = jax.lax.fori_loop(0, steps, one, jnp.ones(copies, jnp.bfloat16))
    spread = np.sqrt(steps * rate * 0.5 * 2**-8 / copies)  # each step's variance is below update x gap
    assert abs(np.asarray(x, np.float64).mean() - (0.5 + 0.5 * (1 - rate) ** steps)) < 5 * spread < 1e-3
    assert jnp.bfloat16(1 - rate * 0.5) == 1


@pytest.mark.parametrize(("stochastic", "moved"), [(True, 1.0), (False, 0.0)])
def test_small_updates(stochastic, moved):
    """Steps of 1e-4, a fortieth of what bfloat16 can tell below 1."""
    optimizer = Adafactor(lambda step: 1e-4, 0.0, 0.0, stochastic)
    params = {name: {"w": jnp.ones((2, 64, 64), jnp.bfloat16)} for name in (*stacks.STACKS, "rest")}
    after, _ = run(optimizer, params, [jax.tree.map(jnp.ones_like, params)] * 20)
    values = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(after)])
    spread = np.sqrt(20 * 1e-4 * 2**-8 / values.size)
    assert abs(values.mean() - (1 - 20 * 1e-4 * moved)) <= 5 * spread * moved
    assert (values == 1).all() == (not moved)


def test_draws_differ_by_step_stack_layer_and_leaf():
    params = {name: {leaf: jnp.ones((2, 64), jnp.bfloat16) for leaf in "ab"} for name in (*stacks.STACKS, "rest")}
    gradient = jax.tree.map(jnp.ones_like, params)
    drawn = []
    for step in (3, 4):
        after, _ = PLAIN.apply(gradient, PLAIN.init(params), params, keys(7, step), step, 1.0, True)
        drawn += [bytes(row) for leaf in jax.tree.leaves(after) for row in np.asarray(leaf.view(jnp.uint16))]
    assert len(set(drawn)) == len(drawn) == 24
    again, _ = PLAIN.apply(gradient, PLAIN.init(params), params, keys(7, 4), 4, 1.0, True)
    jax.tree.map(np.testing.assert_array_equal, after, again)


@pytest.mark.parametrize(("fields", "message"), [
    ({"param_dtype": "bfloat16"}, "param_dtype is 'bfloat16' and name 'adamw'; expected name='adafactor'"),
    ({"fused": True}, "fused is True and name 'adamw'"),
    ({"name": "adafactor", "fused": True}, "clip is 1.0 and fused True: .*expected clip=0"),
    ({"name": "adafactor", "fused": True, "clip": 0.0, "accumulate": 2}, "accumulate is 2 and fused True"),
    ({"name": "adafactor", "param_dtype": "float16"}, "param_dtype is 'float16'; known: float32, bfloat16"),
    ({"name": "adafactor", "rounding": "up"}, "rounding is 'up'; known: stochastic, nearest"),
])
def test_what_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**{"learning_rate": 1.0} | fields)


def test_a_fused_run_is_of_one_device_and_recomputes():
    config = make_config()
    config.optimizer.update({"name": "adafactor", "fused": True, "clip": 0.0})
    config.execution.remat = "none"
    with pytest.raises(UserError, match=r"config.execution.remat is 'none' and config.optimizer.fused True"):
        TrainConfig.of(config)
    config.execution.remat = "full"
    with pytest.raises(UserError, match=r"config.optimizer.fused is True on 8 devices; it is made for one"):
        TrainConfig.of(config).check_devices(8)
