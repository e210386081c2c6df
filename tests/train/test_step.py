"""One training step: its parts, accumulation, averages, and what it does where a number is not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import Execution
from acejax.train.config import OptimizerConfig, TrainConfig
from acejax.train.optimizer import make_optimizer
from acejax.train.step import SIGMA_BINS, init_state, train_step
from tests.counts import count
from tests.train.small import STEPS, make_config, make_stream

STREAM = make_stream()
OPTIMIZER = make_optimizer(OptimizerConfig(1e-2), STEPS)
SETTING = TrainConfig.of(make_config()).setting(Execution(), STREAM.references, len(STREAM.tasks))
STEP = jax.jit(train_step, static_argnums=(2, 3))
BATCH = STREAM[STEPS - 1].arrays  # with references


@pytest.fixture(scope="module")
def state():
    """A step or two old, so that nothing is zero any more."""
    found = init_state(dataclasses.replace(SETTING, ema=0.9), OPTIMIZER)
    for _ in range(2):
        found, _ = STEP(found, BATCH, dataclasses.replace(SETTING, ema=0.9), OPTIMIZER)
    return found


def test_parts_add_up(state):
    _, metrics = STEP(state, BATCH, dataclasses.replace(SETTING, ema=0.9), OPTIMIZER)
    loss = metrics["loss"]
    units = np.append(metrics["ref"], metrics["tar"])
    np.testing.assert_allclose(loss, metrics["fraction"] @ units, rtol=1e-5)
    for name, number in (("task", 4), ("sigma", SIGMA_BINS)):
        assert metrics[name].shape == (number,)
        np.testing.assert_allclose(loss, metrics[f"{name}_fraction"] @ metrics[name], rtol=1e-5)
    assert metrics["ref"].shape == (2,) and metrics["skipped"] == 0 and metrics["gradient_norm"] > 0


@pytest.mark.parametrize("parts", count([4], [2, 4]))
def test_accumulation_changes_rounding_alone(state, parts):
    """Samples differ in length and weight: a mean of means would not do."""
    whole = dataclasses.replace(SETTING, ema=0.9, mask_weight=4.0)
    lengths = BATCH["lengths"].copy()
    lengths[::2] = 4  # not all tokens count
    unit = np.where(np.arange(BATCH["unit"].shape[1]) < lengths[:, None], BATCH["unit"], -2)
    batch = BATCH | {"lengths": lengths, "unit": unit}
    one, metrics = STEP(state, batch, whole, OPTIMIZER)
    other, parted = STEP(state, batch, dataclasses.replace(whole, accumulate=parts), OPTIMIZER)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), metrics, parted)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one.params, other.params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_changes_nothing(state, value):
    setting = dataclasses.replace(SETTING, ema=0.9)
    bad = BATCH | {"target": BATCH["target"].copy()}
    bad["target"][0, 0, 0] = value
    after, metrics = STEP(state, bad, setting, OPTIMIZER)
    assert metrics["skipped"] == 1 and after.skipped == 1 and after.step == state.step + 1
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    again, metrics = STEP(after, BATCH, setting, OPTIMIZER)
    assert metrics["skipped"] == 0 and again.skipped == 1 and np.isfinite(metrics["loss"])


def test_the_average_follows(state):
    after, _ = STEP(state, BATCH, dataclasses.replace(SETTING, ema=0.9), OPTIMIZER)
    decay = min(0.9, (1 + 2) / (10 + 2))
    jax.tree.map(lambda new, average, leaf: np.testing.assert_allclose(
        new, decay * average + (1 - decay) * leaf, rtol=1e-5, atol=1e-7), after.ema, state.ema, after.params)
    assert init_state(SETTING, OPTIMIZER).ema is None


def test_noise_is_the_steps(state):
    """Another step draws other noise; the same step the same."""
    setting = dataclasses.replace(SETTING, ema=0.9)
    losses = [STEP(dataclasses.replace(state, step=jnp.int32(step)), BATCH, setting, OPTIMIZER)[1]["loss"]
              for step in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("channels", count([384], [64, 384, 448]))
def test_every_width_trains(channels):
    """64 sees no picture to edit: its loss does not depend on one."""
    setting = dataclasses.replace(SETTING, config=dataclasses.replace(SETTING.config, in_channels=channels))
    state = init_state(setting, OPTIMIZER)
    for _ in range(2):  # the output layer starts at zero
        state, metrics = STEP(state, BATCH, setting, OPTIMIZER)
    _, other = STEP(state, BATCH | {"edit": -BATCH["edit"]}, setting, OPTIMIZER)
    _, same = STEP(state, BATCH, setting, OPTIMIZER)
    assert (same["loss"] == other["loss"]) == (channels == 64)
