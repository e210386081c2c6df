"""The optimizer and its learning rate, from a config; the rate is a function of the run's step alone."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from acejax.parallel.rules import path_of
from acejax.train.adafactor import Adafactor
from acejax.train.config import OptimizerConfig
from acejax.train.stacks import STACKS, length, put, take
from acejax.train.step import Optimizer

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


def make_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
    """AdamW, Muon for the blocks' kernels and AdamW for the rest, or Adafactor, after clipping by the global norm.

    AdamW's and Muon's moments have the parameters' dtype; their `update` wants the run's `step` as an extra argument,
    so that a skipped step does not put the learning rate off. A rate fits all: Muon's updates are scaled to the size of
    AdamW's (arXiv 2502.16982).
    """
    if config.name == "adafactor":
        return Adafactor(learning_rate(config, steps), config.weight_decay, config.clip,
                         stochastic=config.rounding == "stochastic")
    adamw = functools.partial(optax.adamw, 1.0, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    if config.name == "muon":
        muon = _by_layer(optax.contrib.muon(
            1.0, beta=config.momentum, adam_b1=config.b1, adam_b2=config.b2, eps=config.eps, consistent_rms=0.2,
            weight_decay=config.weight_decay, adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=dimension_numbers))
        direction = optax.partition(dict.fromkeys(STACKS, muon) | {"rest": adamw(nesterov=True)}, lambda params: {
            name: name if name in STACKS else "rest" for name in params})  # nesterov: as Muon's own AdamW
    else:
        direction = adamw()
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, direction, _scale(learning_rate(config, steps)))


def dimension_numbers(params: Any) -> Any:
    """The axes that make up a matrix, for each kernel [in, *features] of a layer; None for the rest.

    Query, key, value and each modulation vector are matrices of their own.
    """
    def numbers(keys, leaf):
        path = path_of(keys)
        if not path.endswith("kernel"):
            return None
        split = re.search(r"(qkv|modulation)/kernel$", path)
        return optax.contrib.MuonDimensionNumbers((0,), tuple(range(2 if split else 1, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(numbers, params)


def _by_layer(layer: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of one layer for stacks [layers, ...], layer by layer and in place.

    All at once, the matrices of a whole stack would be gathered from all devices: 22 GB for a 12B model.
    """
    def update(updates, state, params):
        def one(index, carry):
            return put(carry, layer.update(*take(carry, index), take(params, index)), index)

        return jax.lax.fori_loop(0, length(params), one, (updates, state))

    return optax.GradientTransformation(jax.vmap(layer.init), update)


def _scale(rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, step, **_):
        del params
        return jax.tree.map(lambda leaf: rate(step).astype(leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
