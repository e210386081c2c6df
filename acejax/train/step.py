"""One training step as a pure function of state and batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from acejax import flow, lcu
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.mmdit import Tokens, apply, init

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds; the random numbers of a step come from its seed and `step`."""

    step: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The static part of a step: the model, how it is computed, and what is counted.

    Attributes:
      references: units before the target that L_ref is reported for.
      tasks: number of tasks that losses are reported for.
      mask_weight: weight of the loss where the mask says generate; 1 is ACE++'s plain mean.
      sigma_shift, sigma_spread: of the noise levels' logit-normal distribution; ACE++ has 0 and 1.
    """

    config: MMDiTConfig
    execution: Execution
    references: int
    tasks: int
    mask_weight: float
    sigma_shift: float
    sigma_spread: float
    seed: int


def init_state(setting: StepConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = init(setting.config, jax.random.key(setting.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def loss_fn(params: Any, setting: StepConfig, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The velocity loss of a batch (`acejax.data.stream.Batch`) at random noise and noise levels; guidance is 1, as
    ACE++ trains.
    """
    sigma_key, noise_key = jax.random.split(key)
    x0 = batch["target"].astype(jnp.float32)
    sigma = flow.sample_sigma(sigma_key, x0.shape[:1], setting.sigma_shift, setting.sigma_spread)
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    velocity = predict(params, setting, batch, flow.interpolate(x0, noise, sigma), sigma)
    return flow.loss(velocity, flow.target(x0, noise), weights(setting, batch), batch["task"], setting.tasks)


def predict(params: Any, setting: StepConfig, batch: Batch, noisy: jax.Array, sigma: jax.Array,
            guidance: float = 1.0) -> jax.Array:
    """The velocity [B, S, 64] of a batch at `noisy` latents of noise levels `sigma` [B]; conditions as far as the
    model's channels have room for them.
    """
    parts = {384: ("edit", "mask"), 448: ("edit", "mask", "modify")}.get(setting.config.in_channels, ())
    given = {name: batch[name].astype(jnp.float32) for name in parts}
    if "mask" in given:
        given["mask"] /= 255
    image = lcu.channels(noisy, **given)
    scale = jnp.full_like(sigma, guidance) if setting.config.guidance_embed else None
    tokens = Tokens(image, batch["positions"], batch["text"], batch["pooled"], sigma, scale, batch["lengths"])
    return apply(setting.config, params, tokens, execution=setting.execution)


def weights(setting: StepConfig, batch: Batch) -> jax.Array:
    """What each token counts in each unit, the target last: [B, S, 1, references + 1], 0 on padding."""
    unit = jnp.where(batch["unit"] == -1, setting.references, batch["unit"])
    weight = 1 + (setting.mask_weight - 1) * (batch["mask"].astype(jnp.float32) / 255).mean(-1)
    return (jax.nn.one_hot(unit, setting.references + 1) * weight[..., None])[:, :, None]


def train_step(state: TrainState, batch: Batch, setting: StepConfig,
               optimizer: optax.GradientTransformation) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; metrics are the loss with its parts and the gradient's norm."""
    key = jax.random.fold_in(jax.random.key(setting.seed), state.step)
    (loss, parts), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, setting, batch, key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = parts | {"loss": loss, "gradient_norm": optax.global_norm(gradient)}
    return TrainState(state.step + 1, params, opt_state), metrics
