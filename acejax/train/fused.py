"""A training step that moves each block as soon as its gradient is there: no gradient of the whole model ever is.

Forward, each block's input is kept. Backward, from the last block to the first, a block is recomputed from its input,
differentiated, and moved by Adafactor in place: the blocks before it have no use for its parameters. Of a model in
bfloat16 that saves as much memory as the model takes.

The price is that what must be known of the whole gradient comes too late. It is not clipped by its norm (Adafactor
bounds each layer's update) and not added up over parts of a batch; and where it stops being finite at some block, that
block and those before it stay as they were, while those after it have been moved.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from acejax.model.mmdit import DoubleBlock, MMDiT, SingleBlock
from acejax.train import stacks
from acejax.train.adafactor import Adafactor, keys
from acejax.train.step import (
    Batch,
    StepConfig,
    TrainState,
    average,
    draw,
    errors_of,
    loss_parts,
    noisy_tokens,
    total_weight,
)

BLOCKS = dict(zip(stacks.STACKS, (DoubleBlock, SingleBlock), strict=True))
Block = Callable[[Any, Any, jax.Array], Any]  # (parameters, input, vec) -> output


def fused_step(state: TrainState, batch: Batch, setting: StepConfig, optimizer: Adafactor, frozen: None = None
               ) -> tuple[TrainState, dict[str, jax.Array]]:
    """As `acejax.train.step.train_step`, and with the same metrics; nothing is frozen, a LoRA has no use for it.

    `skipped` is 1 where the loss was not finite and nothing has changed, or where the gradient was not: see above.
    """
    noise, sigma = draw(setting, state.step, batch)
    model, (params, rest) = MMDiT(setting.config, setting.execution), stacks.apart(state.params)

    def embed(rest):
        streams, vec, *fixed = model.apply({"params": rest}, noisy_tokens(setting, batch, noise, sigma), method="embed")
        vec = setting.execution.constrain(vec[:, None], "modulation")[:, 0]  # else a mesh splits it by features
        return (streams, vec), fixed

    def block(name, params, x, vec):
        return BLOCKS[name](setting.config, setting.execution).apply({"params": params}, x, None, vec, *fixed)[0]

    def head(rest, x, vec):
        velocity = model.apply({"params": rest}, x, vec, text_size, method="head")
        errors, weights = errors_of(velocity, setting, batch, noise)
        return errors.sum() / total_weight(setting, batch), (errors, weights)

    (streams, vec), embed_back, fixed = jax.vjp(embed, rest, has_aux=True)
    text_size = streams[0].shape[1]
    double, single = (functools.partial(block, name) for name in stacks.STACKS)
    streams, double_inputs = _forward(double, params["double_blocks"], streams, vec)
    x, single_inputs = _forward(single, params["single_blocks"], jnp.concatenate(streams, axis=1), vec)
    _, head_back, (errors, weights) = jax.vjp(head, rest, x, vec, has_aux=True)
    loss, parts = loss_parts(setting, batch, sigma, errors, weights)

    rounding, moments = keys(setting.seed, state.step), dict(state.opt_state)

    def move(name, layer, gradient, squared, index=0):
        good = jnp.isfinite(loss) & jnp.isfinite(squared)
        return optimizer.layer(gradient, *layer, jax.random.fold_in(rounding[name], index), state.step, good)

    def backward(name, block, inputs, *cotangents):
        layers, *cotangents = _backward(block, (moments[name], params[name]), inputs, vec, cotangents,
                                        functools.partial(move, name))
        moments[name], params[name] = layers
        return cotangents

    gradient, dx, dvec = head_back(jnp.ones((), jnp.float32))
    dx, dvec, squared = backward("single_blocks", single, single_inputs, dx, dvec.astype(jnp.float32),
                                 _squared(gradient))
    dx = dx[:, :text_size], dx[:, text_size:]
    dx, dvec, squared = backward("double_blocks", double, double_inputs, dx, dvec, squared)
    (more,) = embed_back((dx, dvec.astype(vec.dtype)))  # what of `rest` is of the head is 0 here, and the other way
    squared += _squared(more)
    moments["rest"], rest = move("rest", (moments["rest"], rest), jax.tree.map(jnp.add, gradient, more), squared)

    params |= rest
    good = jnp.isfinite(loss) & jnp.isfinite(squared)
    ema = jax.lax.cond(good, lambda: average(setting, state.ema, state.step, params), lambda: state.ema)
    skipped = 1 - good.astype(jnp.int32)
    metrics = parts | {"loss": loss, "gradient_norm": jnp.sqrt(squared), "skipped": skipped}
    return TrainState(state.step + 1, params, moments, ema, state.skipped + skipped), metrics


def _forward(block: Block, stack: Any, x: Any, vec: jax.Array) -> tuple[Any, Any]:
    """The stack's output and the inputs of its blocks."""
    return jax.lax.scan(lambda x, params: (block(params, x, vec), x), x, stack)


def _backward(block: Block, layers: Any, inputs: Any, vec: jax.Array, cotangents: Any, move: Callable[..., Any]
              ) -> tuple[Any, Any, jax.Array, jax.Array]:
    """The stack's layers moved, its input's cotangent, and vec's and the gradient's square with theirs added.

    Args:
      layers: moments and parameters.
      inputs: of the blocks.
      cotangents: of the stack's output, of vec (float32), and the sum of squares of the gradient so far.
      move: (moments and parameters of a layer, gradient, sum of squares, index) -> moments and parameters.
    """
    count = stacks.length(inputs)

    def one(done, carry):
        layers, dx, dvec, squared = carry
        index = count - 1 - done
        layer = stacks.take(layers, index)
        _, back = jax.vjp(block, layer[1], stacks.take(inputs, index), vec)
        gradient, dx, more = back(dx)
        squared += _squared(gradient)
        return stacks.put(layers, move(layer, gradient, squared, index), index), dx, dvec + more, squared

    return jax.lax.fori_loop(0, count, one, (layers, *cotangents))


def _squared(tree: Any) -> jax.Array:
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
