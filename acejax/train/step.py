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


def tokens_of(batch: Batch, noisy: jax.Array, sigma: jax.Array, guidance: float | None) -> Tokens:
    """A batch's conditions around noisy latents [B, h, w, 16] at noise level sigma [B]."""
    image, positions = lcu.pack(noisy, batch["edit"], batch["mask"], batch["modify"])
    full = None if guidance is None else jnp.full(sigma.shape, guidance, jnp.float32)
    return Tokens(image, positions, batch["text"], batch["pooled"], sigma, full)


def loss_fn(params: Any, setting: StepConfig, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The velocity loss of a batch at random noise and noise levels; guidance is 1, as ACE++ trains."""
    sigma_key, noise_key = jax.random.split(key)
    x0 = batch["target"]
    sigma = flow.sample_sigma(sigma_key, x0.shape[:1], setting.sigma_shift, setting.sigma_spread)
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    tokens = tokens_of(batch, flow.interpolate(x0, noise, sigma), sigma, 1.0 if setting.config.guidance_embed else None)
    velocity = apply(setting.config, params, tokens, execution=setting.execution)

    unit = jnp.where(batch["unit"] < 0, setting.references, batch["unit"])  # [B, columns]; the target is the last unit
    units = jnp.tile(jax.nn.one_hot(unit, setting.references + 1), (1, x0.shape[1] // lcu.PATCH, 1))
    generated = lcu.patchify(lcu.fold_mask(batch["mask"].astype(jnp.float32))).mean(-1)
    units = units * (1 + (setting.mask_weight - 1) * generated)[..., None]
    return flow.loss(velocity, lcu.patchify(flow.target(x0, noise)), units[:, :, None], batch["task"], setting.tasks)


def train_step(state: TrainState, batch: Batch, setting: StepConfig,
               optimizer: optax.GradientTransformation) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; metrics are the loss with its parts and the gradient's norm."""
    key = jax.random.fold_in(jax.random.key(setting.seed), state.step)
    (loss, parts), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, setting, batch, key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = parts | {"loss": loss, "gradient_norm": optax.global_norm(gradient)}
    return TrainState(state.step + 1, params, opt_state), metrics
