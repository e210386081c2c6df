"""Velocity matching: goldens of the schedule, the sampler against a hand loop, the loss and all its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import flow, lcu
from tests.counts import count

SEEDS = range(count(3, 50))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Schedule and sampler


@pytest.mark.parametrize("seq_len, first, last", [
    (4096, [1, 0.9884086, 0.9762225, 0.9633944], [0.1954546, 0.1047209, 0]),
    (2048, [1, 0.9836842, 0.9666985], [0.1465881, 0.0763854, 0]),
])
def test_schedule_goldens(seq_len, first, last):
    """28 steps as black-forest-labs/flux `get_schedule` gives them."""
    sigmas = np.asarray(flow.schedule(28, seq_len))
    assert sigmas.shape == (29,) and sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas[:len(first)], first, atol=2e-7)
    np.testing.assert_allclose(sigmas[-len(last):], last, atol=2e-7)


@pytest.mark.parametrize("seq_len", [16, 256, 1024, 4096, 9216])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_schedule_is_the_reference_formula(steps, seq_len):
    """scepter: e^mu / (e^mu + 1 / tau - 1), mu linear in the tokens and not clamped; exactly 1 and 0 at the ends."""
    mu = 0.5 + 0.65 * (seq_len - 256) / 3840
    tau = np.arange(steps, 0, -1) / steps
    sigmas = np.asarray(flow.schedule(steps, seq_len))
    np.testing.assert_allclose(sigmas[:-1], np.exp(mu) / (np.exp(mu) + 1 / tau - 1), atol=1e-6)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("steps", [0, -3])
def test_schedule_needs_a_step(steps):
    with pytest.raises(ValueError, match=f"at least one step; found {steps}"):
        flow.schedule(steps, 256)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_euler_is_the_loop(dtype):
    def velocity(latents, sigma):
        assert sigma.shape == () and sigma.dtype == jnp.float32
        return jnp.sin(latents) + sigma * latents

    sigmas = flow.schedule(5, 1024)
    noise = expected = jnp.asarray(normal(0, 2, 4, 4, 3), dtype)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        expected = (expected + (following - sigma) * velocity(expected, sigma)).astype(dtype)
    found = flow.euler(velocity, noise, sigmas)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2  # bfloat16: fused and unfused steps round differently
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=tolerance)


@pytest.mark.parametrize("steps", [1, 7, 28])
def test_euler_is_exact_where_the_path_is_straight(steps):
    """The true velocity of one pair of picture and noise leads from the noise to the picture in any number of steps."""
    x0, noise = normal(1, 2, 4, 4, 16), normal(2, 2, 4, 4, 16)
    found = flow.euler(lambda latents, sigma: flow.target(x0, noise), noise, flow.schedule(steps, 64))
    np.testing.assert_allclose(found, x0, atol=5e-6)


def test_interpolate_runs_from_picture_to_noise():
    x0, noise = normal(1, 3, 4, 2, 5), normal(2, 3, 4, 2, 5)
    sigma = jnp.array([0, 0.25, 1])
    mixed = flow.interpolate(x0, noise, sigma)
    np.testing.assert_array_equal(mixed[0], x0[0])
    np.testing.assert_allclose(mixed[1], 0.75 * x0[1] + 0.25 * noise[1], rtol=1e-6)
    np.testing.assert_array_equal(mixed[2], noise[2])


def test_target_is_the_path_s_derivative():
    x0, noise = normal(1, 2, 6), normal(2, 2, 6)
    _, slope = jax.jvp(lambda s: flow.interpolate(x0, noise, s), (jnp.full(2, 0.3),), (jnp.ones(2),))
    np.testing.assert_allclose(flow.target(x0, noise), slope, rtol=1e-6)


def test_sigma_is_logit_normal():
    sigma = np.asarray(flow.sample_sigma(jax.random.key(0), (20_000,)), np.float64)
    assert sigma.min() > 0 and sigma.max() < 1
    logit = np.log(sigma / (1 - sigma))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0, 1], atol=0.03)
    np.testing.assert_allclose(np.mean(np.abs(logit) < 1), 0.6827, atol=0.015)


# Loss


def canvas_units(height, widths, batch):
    units = lcu.membership(height, widths)
    return jnp.broadcast_to(units, (batch, *units.shape))


def check_parts(velocity, expected, units, task=None, tasks=0):
    """loss(...) against sums written out in float64, and that the parts recombine; returns what loss gave."""
    total, parts = flow.loss(velocity, expected, units, None if task is None else {"task": (task, tasks)})
    weight = np.broadcast_to(np.asarray(units, np.float64), (*velocity.shape, units.shape[-1]))
    error = np.square(np.asarray(velocity, np.float64) - np.asarray(expected, np.float64))[..., None] * weight
    np.testing.assert_allclose(total, error.sum() / weight.sum(), rtol=1e-5)

    by_unit = np.array([*parts["ref"], parts["tar"]])
    for unit, (found, fraction) in enumerate(zip(by_unit, parts["fraction"], strict=True)):
        size = weight[..., unit].sum()
        np.testing.assert_allclose(found, error[..., unit].sum() / size if size else 0, rtol=1e-5)
        np.testing.assert_allclose(fraction, size / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(np.sum(parts["fraction"]), 1, rtol=1e-6)
    np.testing.assert_allclose(by_unit @ np.asarray(parts["fraction"]), total, rtol=1e-5)

    if task is not None:
        for index in range(tasks):
            mine = np.asarray(task) == index
            size = weight[mine].sum()
            np.testing.assert_allclose(parts["task"][index], error[mine].sum() / size if size else 0, rtol=1e-5)
            np.testing.assert_allclose(parts["task_fraction"][index], size / weight.sum(), rtol=1e-5)
        np.testing.assert_allclose(np.sum(parts["task_fraction"]), 1, rtol=1e-6)
        np.testing.assert_allclose(np.dot(parts["task"], parts["task_fraction"]), total, rtol=1e-5)
    return total, parts


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_is_the_element_mean(seed):
    """ACE_plus `ace_plus_ldm.py`: the plain mean over all valid elements, references included."""
    velocity, expected = normal(seed, 3, 12, 64), normal(seed + 100, 3, 12, 64)
    total, parts = check_parts(velocity, expected, canvas_units(4, [2, 6, 4], 3))
    np.testing.assert_allclose(total, np.mean((velocity - expected) ** 2), rtol=1e-6)
    np.testing.assert_allclose(parts["fraction"], np.array([2, 6, 4]) / 12, rtol=1e-6)
    assert parts["ref"].shape == (2,) and parts["tar"].shape == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_recombine_with_padding_and_tasks(seed):
    """Canvases of two sizes in one batch, the smaller one padded: bigger pictures weigh more."""
    velocity, expected = normal(seed, 4, 16, 64), normal(seed + 100, 4, 16, 64)
    big, small = lcu.membership(4, [4, 4, 8]), lcu.membership(2, [2, 4, 4])
    units = jnp.stack([big, lcu.pad(small[None], 16)[0], big, big])
    task = jnp.array([0, 3, 1, 1])
    total, parts = check_parts(velocity, expected, units, task, tasks=4)
    valid = [slice(None), slice(5), slice(None), slice(None)]
    elements = np.concatenate([((velocity - expected)[b, rows] ** 2).ravel() for b, rows in enumerate(valid)])
    np.testing.assert_allclose(total, elements.mean(), rtol=1e-5)
    assert parts["task"][2] == 0 and parts["task_fraction"][2] == 0  # no sample of task 2

    noise_there = velocity.copy()
    noise_there[1, 5:] += 1e3
    assert flow.loss(noise_there, expected, units)[0] == total


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_recombine_where_a_seam_cuts_a_latent_pixel(seed):
    """Weights per element: a column of latent pixels that is 3/8 reference and 5/8 target counts in both."""
    height, width = 4, 6
    share = np.zeros((1, height, width, 16, 2), np.float32)  # latent pixels, then unit: reference, target
    share[..., :2, :, 0], share[..., 2, :, 0] = 1, 3 / 8
    share[..., 1] = 1 - share[..., 0]
    units = jnp.stack([lcu.patchify(share[..., unit]) for unit in range(2)], axis=-1)
    assert units.shape == (1, 6, 64, 2)
    velocity, expected = normal(seed, 1, 6, 64), normal(seed + 100, 1, 6, 64)
    total, parts = check_parts(velocity, expected, units, jnp.array([1]), tasks=2)
    np.testing.assert_allclose(total, np.mean((velocity - expected) ** 2), rtol=1e-5)
    np.testing.assert_allclose(parts["fraction"], [(2 + 3 / 8) / 6, (3 + 5 / 8) / 6], rtol=1e-6)


def test_an_absent_unit_counts_nothing():
    """A batch without references: L_ref 0 with fraction 0, and finite gradients."""
    velocity, expected = normal(0, 2, 4, 64), normal(1, 2, 4, 64)
    units = jnp.zeros((2, 4, 1, 3)).at[..., 2].set(1)
    total, parts = check_parts(velocity, expected, units)
    np.testing.assert_array_equal(parts["ref"], [0, 0])
    np.testing.assert_allclose(parts["tar"], total, rtol=1e-6)
    gradient = jax.grad(lambda v: flow.loss(v, expected, units)[1]["ref"].sum())(velocity)
    assert not gradient.any()


def test_an_empty_batch_has_loss_zero():
    velocity, expected = normal(0, 2, 4, 64), normal(1, 2, 4, 64)
    total, parts = flow.loss(velocity, expected, jnp.zeros((2, 4, 1, 2)), {"task": (jnp.array([0, 1]), 2)})
    assert total == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parts))


def test_loss_is_float32_whatever_comes_in():
    """bfloat16 velocities are squared and summed in float32: (1 + 1/128)^2 is no bfloat16 number."""
    velocity = jnp.full((1, 4, 64), 1 + 2**-7, jnp.bfloat16)
    total, parts = flow.loss(velocity, jnp.zeros_like(velocity), canvas_units(4, [2, 2], 1))
    assert total == (1 + 2**-7) ** 2
    assert {leaf.dtype for leaf in jax.tree.leaves((total, parts))} == {jnp.dtype("float32")}
