"""The optimizer and its learning rate, from a config; the rate is a function of the run's step alone."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from acejax.parallel.rules import path_of
from acejax.train.config import OptimizerConfig

FALLING = {  # by schedule: the share of the rate that is left when a share of the run, warm-up apart, is done
    "constant": jnp.ones_like,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,
}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` of the run, then `schedule` to its end."""
    warmup = round(config.warmup * steps)

    def rate(step: jax.Array) -> jax.Array:
        rising = jnp.minimum(step / warmup, 1.0) if warmup else 1.0
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return config.learning_rate * rising * FALLING[config.schedule](done)

    return rate


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW, or Muon for the blocks' kernels and AdamW for the rest, after clipping by the global norm.

    Moments have the parameters' dtype. `update` wants the run's `step` as an extra argument, so that a skipped step
    does not put the learning rate off. A rate fits both: Muon's updates are scaled to the size of AdamW's
    (arXiv 2502.16982).
    """
    if config.name == "muon":
        direction = optax.contrib.muon(
            1.0, beta=config.momentum, adam_b1=config.b1, adam_b2=config.b2, eps=config.eps, consistent_rms=0.2,
            weight_decay=config.weight_decay, adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=dimension_numbers)
    else:
        direction = optax.adamw(1.0, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), direction, _scale(learning_rate(config, steps)))


def dimension_numbers(params: Any) -> Any:
    """The axes that make up a matrix, for each kernel of the two stacks: [layers, in, *features]; None for the rest.

    Each layer's query, key, value and modulation vector is a matrix of its own. (By default optax takes leaves of two
    axes, which in a stack are biases and scales.)
    """
    def numbers(keys, leaf):
        path = path_of(keys)
        if not re.search(r"(double|single)_blocks/.*/kernel$", path):
            return None
        split = re.search(r"(qkv|modulation)/kernel$", path)
        return optax.contrib.MuonDimensionNumbers((1,), tuple(range(3 if split else 2, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(numbers, params)


def _scale(rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, step, **_):
        del params
        return jax.tree.map(lambda leaf: rate(step).astype(leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
