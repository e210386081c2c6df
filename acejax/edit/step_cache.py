"""Steps that leave the blocks out: what they added to the picture's tokens at the last full step is added again.

After TeaCache (arXiv:2411.19108), with one difference: the modulation of all steps is known beforehand, and so are the
steps that can be left out, whatever the picture. They differ by prompt: a batch of one prompt leaves out what each of
its edits alone would.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from acejax.model.mmdit import Params


def full_steps(made: Params, threshold: float) -> jax.Array:
    """[N] bool: the steps that run the blocks. The first and the last do, others where enough has changed since.

    Args:
      made: the modulation of N steps (`acejax.model.modulation.modulations`).
      threshold: how much the first image block's modulation may change, in relative mean differences added up step by
        step, before the blocks run again; 0 leaves no step out.
    """
    first = made["double_blocks"]["img"][:, 0].astype(jnp.float32)
    size = jnp.abs(first).mean((1, 2, 3))
    change = jnp.abs(first[1:] - first[:-1]).mean((1, 2, 3)) / size[:-1]

    def step(total, change):
        total += change
        return jnp.where(total > threshold, 0, total), total > threshold

    _, full = jax.lax.scan(step, jnp.zeros(()), change)
    return jnp.concatenate([jnp.ones(1, bool), full]).at[-1].set(True)


def euler(forward: Callable[..., tuple[jax.Array, jax.Array]], noise: jax.Array, sigmas: jax.Array, made: Params,
          residual: jax.ShapeDtypeStruct, full: jax.Array, span: tuple[Any, Any] | None = None) -> jax.Array:
    """`acejax.flow.euler` with steps left out.

    Args:
      forward: (latents, sigma, modulation, residual) -> velocity and what the blocks added; with a residual they do not
        run.
      residual: its shape and dtype.
      full: [N] bool, the steps that run the blocks.
      span: as of `acejax.flow.euler`; it starts with such a step.
    """
    def step(i, carry):
        latents, residual = carry
        one = jax.tree.map(lambda leaf: leaf[i], made)
        velocity, residual = jax.lax.cond(full[i], lambda kept: forward(latents, sigmas[i], one, None),
                                          lambda kept: forward(latents, sigmas[i], one, kept), residual)
        return (latents + (sigmas[i + 1] - sigmas[i]) * velocity).astype(noise.dtype), residual

    start = noise, jnp.zeros(residual.shape, residual.dtype)
    return jax.lax.fori_loop(*(span or (0, len(sigmas) - 1)), step, start)[0]
