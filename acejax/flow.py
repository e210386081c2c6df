"""Velocity matching: noise levels, interpolation, loss with its exact split, sampling schedule, Euler sampler.

Convention (FLUX, scepter `FlowMatchFluxShiftScheduler`): x_sigma = (1 - sigma) x0 + sigma noise and the network
predicts v = noise - x0, with sigma as its time. The paper's t and u are 1 - sigma and -v.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Groups = Mapping[str, tuple[jax.Array, int]]


def sample_sigma(key: jax.Array, shape: tuple[int, ...], shift: float = 0.0, spread: float = 1.0) -> jax.Array:
    """Training noise levels, logit-normal(shift, spread), float32 in (0, 1).

    ACE++ trains with shift 0 and spread 1; it draws from a table of 998 such values fixed at start (ace_plus_ldm.py,
    `PRE_T_SAMPLE`), ours are fresh ones of the same distribution. A positive shift gives more time to high noise, as
    `schedule` does when sampling: small pictures of little detail show their content early.
    """
    return jax.nn.sigmoid(shift + spread * jax.random.normal(key, shape, jnp.float32))


def interpolate(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_sigma for x0 and noise [B, ...] and sigma [B]."""
    sigma = sigma.reshape(-1, *(1,) * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise


def target(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity to match."""
    return noise - x0


def loss(velocity: jax.Array, expected: jax.Array, units: jax.Array, groups: Groups | None = None
         ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared velocity error over all weighted elements of the batch, and the parts it is made of.

    With weights of 0 and 1 this is the reference's element mean (ACE_plus `ace_plus_ldm.py`): bigger pictures weigh
    more, and references, kept and generated areas alike. The paper's L_ref + L_tar is a sum; here
    `loss = sum(fraction * [*ref, tar])` exactly, and also `loss = sum(NAME_fraction * NAME)` for each of the groups.

    Args:
      velocity, expected: [B, S, 64].
      units: weight of each element in each unit, target last: [B, S, 1 or 64, units], 0 on padded tokens
        (`acejax.lcu.membership`; fractions where a seam cuts a latent pixel).
      groups: ways to divide the samples, as `parts` takes them.

    Returns:
      The loss (float32 scalar) and its parts, as `parts`.
    """
    return parts(*errors(velocity, expected, units), groups)


def errors(velocity: jax.Array, expected: jax.Array, units: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted squared errors and weights of each sample's units, [B, units] both; arguments as of `loss`.

    They add up: over the samples of a batch, and over batches.
    """
    squared = jnp.square(velocity.astype(jnp.float32) - expected.astype(jnp.float32))
    repeats = squared.shape[-1] // units.shape[-2]
    squared = squared.reshape(*squared.shape[:2], -1, repeats).sum(-1) if repeats > 1 else squared
    # no matrix product: those round on GPU and TPU
    return (squared[..., None] * units).sum((1, 2)), repeats * units.sum((1, 2))


def parts(errors: jax.Array, weights: jax.Array, groups: Groups | None = None
          ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch and its parts, from what `errors` gives for its samples.

    Args:
      errors, weights: [B, units], the target last.
      groups: name -> (index [B] int32, number of groups), e.g. each sample's task.

    Returns:
      The loss (float32 scalar) and: `ref` [units - 1], `tar`, `fraction` [units]; for each of the groups `NAME` and
      `NAME_fraction` [number]. A unit or a group that is absent has loss 0 and fraction 0.
    """
    total = jnp.maximum(weights.sum(), 1e-9)
    by_unit = _ratio(errors.sum(0), weights.sum(0))
    found = {"ref": by_unit[:-1], "tar": by_unit[-1], "fraction": weights.sum(0) / total}
    for name, (index, number) in (groups or {}).items():
        member = jax.nn.one_hot(index, number).T  # [number, B]
        of_group, weight = ((member * part.sum(1)).sum(1) for part in (errors, weights))
        found |= {name: _ratio(of_group, weight), f"{name}_fraction": weight / total}
    return errors.sum() / total, found


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, 0 where there is nothing."""
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)


def schedule(steps: int, seq_len: int) -> jax.Array:
    """Sampling noise levels [steps + 1], float32, from 1 down to 0.

    Shifted towards high noise by the number of image tokens of the whole canvas, references included (BFL
    `sampling.py` `get_schedule`: mu runs linearly from 0.5 at 256 tokens to 1.15 at 4,096, not clamped).
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step; found {steps}")
    mu = 0.5 + (1.15 - 0.5) * (seq_len - 256) / (4096 - 256)
    tau = np.linspace(1, 0, steps + 1)
    return jnp.asarray(np.exp(mu) * tau / (1 + (np.exp(mu) - 1) * tau), jnp.float32)


def euler(velocity_fn: Callable[..., jax.Array], noise: jax.Array, sigmas: jax.Array, *each: Any,
          span: tuple[Any, Any] | None = None) -> jax.Array:
    """Integrate from noise to data as one loop.

    Args:
      velocity_fn: (latents, sigma, *each) -> velocity of the latents' shape; sigma is a float32 scalar.
      noise: the latents at sigmas[0], or where the span starts.
      sigmas: [steps + 1], from `schedule`.
      each: trees whose leaves [steps, ...] hold something of each step.
      span: the first step to take and the first not to; None is all. They may be traced, so that one program takes any
        part of the way; then there are no gradients.

    Returns:
      The latents at sigmas[-1], or where the span ends, in noise's dtype.
    """
    def step(i, latents):
        velocity = velocity_fn(latents, sigmas[i], *jax.tree.map(lambda leaf: leaf[i], each))
        return (latents + (sigmas[i + 1] - sigmas[i]) * velocity).astype(noise.dtype)

    return jax.lax.fori_loop(*(span or (0, len(sigmas) - 1)), step, noise)
