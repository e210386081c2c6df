"""The fused step against the ordinary one: the same updates, without a gradient of the whole model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import Execution
from acejax.train.config import TrainConfig
from acejax.train.fused import fused_step
from acejax.train.loop import train
from acejax.train.optimizer import make_optimizer
from acejax.train.stacks import apart
from acejax.train.step import init_state, train_step
from tests.train.small import losses, make_config, make_stream

SIZES = ((12, 8),)
pytestmark = pytest.mark.long  # two full training steps are compiled
STREAM = make_stream(batch_sizes=SIZES)
BATCH = STREAM[19].arrays
DEEP = {"hidden_size": 128, "num_heads": 1, "axes_dim": (16, 56, 56), "depth": 8, "depth_single_blocks": 12}


def config(**optimizer):
    found = make_config(SIZES)
    found.optimizer.update({"name": "adafactor", "clip": 0.0, "learning_rate": 1e-3} | optimizer)
    found.execution.remat = "full"
    return found


@pytest.fixture(scope="module")
def steps():
    """The state before, and both steps compiled: for a model whose gradient is large beside its activations."""
    found = config(ema=0.9)
    found.model.update(DEEP)
    run = TrainConfig.of(found)
    setting = run.setting(Execution(remat="full"), STREAM.references, len(STREAM.tasks))
    optimizer = make_optimizer(run.optimizer, run.steps)
    state = init_state(setting, optimizer)
    return state, [jax.jit(functools.partial(step, setting=setting, optimizer=optimizer), donate_argnums=0)
                   .lower(state, BATCH).compile() for step in (train_step, fused_step)]


def test_updates_are_those_of_the_ordinary_step(steps):
    state, compiled = steps
    states = [jax.tree.map(jnp.copy, state) for _ in compiled]
    for _ in range(4):  # in the first, all but the output layer stand still
        metrics = []
        for number, step in enumerate(compiled):
            states[number], found = step(states[number], BATCH)
            metrics.append(found)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6), *metrics)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), states[0].params,
                     states[1].params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *states)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), states[1].params, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-5, "all layers and leaves have learnt"


def test_no_gradient_tree(steps):
    state, (ordinary, fused) = steps
    stacked = sum(leaf.nbytes for leaf in jax.tree.leaves(apart(state.params)[0]))
    assert ordinary.memory_analysis().temp_size_in_bytes > stacked
    assert fused.memory_analysis().temp_size_in_bytes < stacked / 2
    assert fused.memory_analysis().alias_size_in_bytes > 2 * stacked, "parameters and averages are changed in place"


def test_what_is_not_finite_changes_nothing(steps):
    state, (_, fused) = steps
    target = BATCH["target"].copy()
    target[0, 0, 0] = np.nan
    after, metrics = fused(jax.tree.map(jnp.copy, state), BATCH | {"target": target})
    assert metrics["skipped"] == 1 and after.skipped == 1 and after.step == state.step + 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state, after.ema),
                 (state.params, state.opt_state, state.ema))


@pytest.mark.soak
def test_a_run_in_bfloat16_is_taken_up_again(tmp_path):
    """Bit for bit: rounding is drawn from the seed and the step."""
    found = config(param_dtype="bfloat16", fused=True)
    state, _ = train(found, tmp_path, STREAM, until=6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    before = losses(tmp_path)
    for path in (tmp_path / "checkpoints" / "6").rglob("*"):  # as killed before step 6 was saved
        if path.is_file():
            path.unlink()
    again, _ = train(found, tmp_path, STREAM, until=6)
    assert losses(tmp_path) == before and np.mean(before[-2:]) < before[0]
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["gradient_norm"] > 0
