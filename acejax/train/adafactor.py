"""Adafactor (arXiv 1804.04235) for a model of stacked layers, and parameters in bfloat16 that follow small updates.

A layer is updated by itself, so that what Adafactor takes means over is one layer's matrix, not a stack of them, and
so that no more than one layer's update is there at a time: all of them would be as large as the parameters.

A rate fits AdamW and Adafactor alike: an update's root mean square is at most the rate, and it is not scaled by that of
the parameters (modulation starts at zero, and would stay there).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from acejax.train import stacks

# The paper's: moments of the axes (or, below 128 features, of the elements) that follow the squared gradient with
# 1 - t^-0.8, and an update whose root mean square over a matrix is at most 1.
DIRECTION = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """The optimizer. It is no `optax` one: those give updates as a tree, in float32 twice the bfloat16 parameters.

    Attributes:
      rate: learning rate of a step.
      weight_decay: of all parameters, times the rate.
      clip: the greatest global norm of a gradient, 0 for none.
      stochastic: how bfloat16 parameters are rounded: up or down at random, so that the mean is exact, or to the
        nearest, which leaves a parameter as it is when its update is below half a step (2^-9 of it).
    """

    rate: optax.Schedule
    weight_decay: float
    clip: float
    stochastic: bool

    def init(self, params: Any) -> dict[str, Any]:
        """Moments in float32: of each layer of the stacks, and of the `rest`."""
        stacked, rest = stacks.apart(params)
        return {name: jax.vmap(_begin)(stack) for name, stack in stacked.items()} | {"rest": _begin(rest)}

    def apply(self, gradient: Any, state: Any, params: Any, keys: dict[str, jax.Array], step: jax.Array,
              norm: jax.Array, good: jax.Array) -> tuple[Any, Any]:
        """Parameters and state after a step whose whole gradient is there, layer by layer and in place.

        Args:
          keys: as `keys` gives them.
          norm: of the gradient.
          good: False leaves all as it was.
        """
        scale = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-30)) if self.clip else 1.0
        (gradients, gradient), (stacked, rest), moments = stacks.apart(gradient), stacks.apart(params), {}
        for name, stack in stacked.items():
            def one(index, carry, name=name):
                layer = self.layer(stacks.take(gradients[name], index), *stacks.take(carry, index),
                                   jax.random.fold_in(keys[name], index), step, good, scale)
                return stacks.put(carry, layer, index)

            carry = jax.lax.fori_loop(0, stacks.length(stack), one, (state[name], stack))
            moments[name], stacked[name] = carry
        moments["rest"], rest = self.layer(gradient, state["rest"], rest, jax.random.fold_in(keys["rest"], 0),
                                         step, good, scale)
        return stacked | rest, moments

    def layer(self, gradient: Any, moments: Any, params: Any, key: jax.Array, step: jax.Array, good: jax.Array,
              scale: jax.Array | float = 1.0) -> tuple[Any, Any]:
        """Moments and parameters of one layer after a step; as they were unless `good`.

        Args:
          gradient: of one layer, in any dtype.
          key: decides the rounding.
          scale: times which the gradient is taken.
        """
        direction, new = DIRECTION.update(jax.tree.map(lambda leaf: scale * leaf, _wide(gradient)), moments,
                                          _wide(params))
        rate, leaves = self.rate(step), jax.tree.leaves(params)

        def move(leaf: jax.Array, along: jax.Array, number: int) -> jax.Array:
            wide = leaf.astype(jnp.float32)
            wide = wide - rate * (along + self.weight_decay * wide)
            if leaf.dtype == jnp.bfloat16 and self.stochastic:
                bits = jax.random.bits(jax.random.fold_in(key, number), leaf.shape, jnp.uint16)
                return stochastic_round(wide, bits)
            return wide.astype(leaf.dtype)

        moved = [move(*leaf) for leaf in zip(leaves, jax.tree.leaves(direction), range(len(leaves)), strict=True)]
        moved = jax.tree.unflatten(jax.tree.structure(params), moved)
        return jax.tree.map(lambda after, before: jnp.where(good, after, before), (new, moved), (moments, params))


def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 to one of its two neighbours in bfloat16, to the upper one for that share of all `bits` (uint16) by which
    x lies above the lower: the mean over bits is x itself.
    """
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits  # a carry out of the 16 bits that bfloat16 lacks
    return jax.lax.bitcast_convert_type(raw & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def _begin(params: Any) -> Any:
    return DIRECTION.init(_wide(params))


def _wide(tree: Any) -> Any:
    """In float32, as moments must be: they follow with 1e-4 of a difference, of which bfloat16 has nothing."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def keys(seed: int, step: jax.Array) -> dict[str, jax.Array]:
    """What rounding is drawn from in a step, by stack. "rbg", as threefry computes more for each number."""
    key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), step)
    return {name: jax.random.fold_in(key, number) for number, name in enumerate((*stacks.STACKS, "rest"))}
