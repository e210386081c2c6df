"""One training step as a pure function of state and batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from acejax import flow, lcu
from acejax.adapt.lora import spread
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.mmdit import Tokens, apply, init
from acejax.train.adafactor import Adafactor, keys

Batch = dict[str, jax.Array]
Optimizer = optax.GradientTransformation | Adafactor
SIGMA_BINS = 10  # of equal width, that the loss is reported for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds; the random numbers of a step come from its seed and `step`.

    Attributes:
      step: steps done, skipped ones too.
      params: what is trained: the model's parameters, or a LoRA's factors (`acejax.adapt.lora.tie`).
      opt_state: the optimizer's.
      ema: their average over time in float32, or None.
      skipped: steps that changed nothing, as their loss or gradient was not finite.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The static part of a step: the model, how it is computed, and what is counted.

    Attributes:
      references: units before the target that L_ref is reported for.
      tasks: number of tasks that losses are reported for.
      mask_weight: weight of the loss where the mask says generate; 1 is ACE++'s plain mean.
      sigma_shift, sigma_spread: of the noise levels' logit-normal distribution; ACE++ has 0 and 1.
      accumulate: parts that a batch is computed in, one after the other; only rounding depends on it.
      ema: decay of the averaged parameters, 0 for none.
      param_dtype: that parameters are kept in.
    """

    config: MMDiTConfig
    execution: Execution
    references: int
    tasks: int
    mask_weight: float
    sigma_shift: float
    sigma_spread: float
    seed: int
    accumulate: int = 1
    ema: float = 0.0
    param_dtype: str = "float32"


def init_state(setting: StepConfig, optimizer: Optimizer, params: Any = None) -> TrainState:
    """The state before the first step, at random parameters or those given."""
    params = init(setting.config, jax.random.key(setting.seed)) if params is None else params
    params = jax.tree.map(lambda leaf: leaf.astype(setting.param_dtype), params)
    ema = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params) if setting.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, jnp.zeros((), jnp.int32))


def whole(params: Any, frozen: Any = None) -> dict[str, Any]:
    """The trees that `acejax.apply` takes, by keyword: all is trained, or a LoRA's factors on a frozen base
    (`acejax.train.lora`)."""
    if frozen is None:
        return {"params": params}
    return {name: frozen[name] for name in ("params", "quant") if name in frozen} | {
        "lora": spread(params, frozen["scales"])}


def velocity_errors(params: Any, setting: StepConfig, batch: Batch, noise: jax.Array, sigma: jax.Array,
                    frozen: Any = None) -> tuple[jax.Array, jax.Array]:
    """`acejax.flow.errors` of a batch (`acejax.data.stream.Batch`): [B, references + 1] errors and weights.

    `noise` is [B, S, 64] and `sigma` [B]; guidance is 1, as ACE++ trains. A model of 64 channels sees the noisy latents
    alone: text to image. `frozen` is as `whole` says.
    """
    velocity = apply(setting.config, tokens=noisy_tokens(setting, batch, noise, sigma), execution=setting.execution,
                     **whole(params, frozen))
    return errors_of(velocity, setting, batch, noise)


def noisy_tokens(setting: StepConfig, batch: Batch, noise: jax.Array, sigma: jax.Array) -> Tokens:
    """What the model sees of a batch in training."""
    x0 = batch["target"].astype(jnp.float32)
    return tokens(setting.config, batch, flow.interpolate(x0, noise, sigma), sigma)


def errors_of(velocity: jax.Array, setting: StepConfig, batch: Batch, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`velocity_errors` of what the model made of it."""
    expected = flow.target(batch["target"].astype(jnp.float32), noise)
    return flow.errors(velocity, expected, _units(setting, batch))


def tokens(config: MMDiTConfig, batch: Batch, noisy: jax.Array, sigma: jax.Array, guidance: float = 1.0) -> Tokens:
    """A batch with its noisy latents [B, S, 64] as what the model sees."""
    parts = {} if config.in_channels == 64 else {"edit": batch["edit"], "mask": batch["mask"].astype(jnp.float32) / 255}
    if config.in_channels == 448:
        parts["modify"] = batch["modify"]
    return Tokens(lcu.channels(noisy, **parts), batch["positions"], batch["text"], batch["pooled"], sigma,
                  jnp.full_like(sigma, guidance) if config.guidance_embed else None, batch["lengths"])


def _units(setting: StepConfig, batch: Batch) -> jax.Array:
    """The weight of each token in each unit, [B, S, 1, references + 1]; padding has none."""
    unit = jnp.where(batch["unit"] == -1, setting.references, batch["unit"])  # the target is the last unit
    weight = 1 + (setting.mask_weight - 1) * batch["mask"].astype(jnp.float32).mean(-1) / 255
    return (jax.nn.one_hot(unit, setting.references + 1) * weight[..., None])[:, :, None]


def total_weight(setting: StepConfig, batch: Batch) -> jax.Array:
    """That a batch's errors are divided by to make the loss."""
    return jnp.maximum(64 * _units(setting, batch).sum(), 1e-9)


def draw(setting: StepConfig, step: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """A step's noise [B, S, 64] and noise levels [B], both float32."""
    sigma_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(setting.seed), step))
    shape = batch["target"].shape
    sigma = flow.sample_sigma(sigma_key, shape[:1], setting.sigma_shift, setting.sigma_spread)
    return jax.random.normal(noise_key, shape, jnp.float32), sigma


def loss_parts(setting: StepConfig, batch: Batch, sigma: jax.Array, errors: jax.Array, weights: jax.Array
               ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its parts (`acejax.flow.parts`, with groups `task` and `sigma`)."""
    bins = jnp.int32(sigma * SIGMA_BINS)  # sigma < 1, but for rounding: one_hot has nothing at SIGMA_BINS
    return flow.parts(errors, weights, {
        "task": (batch["task"], setting.tasks), "sigma": (jnp.minimum(bins, SIGMA_BINS - 1), SIGMA_BINS)})


def average(setting: StepConfig, ema: Any, step: jax.Array, params: Any) -> Any:
    """The averaged parameters after a step that made `params`."""
    if not setting.ema:
        return None
    decay = jnp.minimum(setting.ema, (1 + step) / (10 + step))  # short at first: the start fades
    return jax.tree.map(lambda mean, leaf: decay * mean + (1 - decay) * leaf.astype(jnp.float32), ema, params)


def train_step(state: TrainState, batch: Batch, setting: StepConfig, optimizer: Optimizer, frozen: Any = None
               ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, at noise and noise levels that the seed and the step decide.

    The gradient is that of `state.params` alone: `frozen` (as `whole` says) has none, and no moments. A loss or
    gradient that is not finite leaves parameters, optimizer and average as they were. An optimizer of optax may take
    the step as an extra argument (`acejax.train.optimizer`).

    Returns:
      The next state, and metrics: `loss` and its parts (`loss_parts`), `gradient_norm` before clipping, `skipped` (0
      or 1).
    """
    noise, sigma = draw(setting, state.step, batch)
    gradient, errors, weights = _gradient(state.params, setting, batch, noise, sigma, frozen)
    loss, parts = loss_parts(setting, batch, sigma, errors, weights)
    norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient))
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def update(params, opt_state, ema):
        advance = optax.with_extra_args_support(optimizer).update
        updates, opt_state = advance(gradient, opt_state, params, step=state.step)
        params = optax.apply_updates(params, updates)
        return params, opt_state, average(setting, ema, state.step, params)

    if isinstance(optimizer, Adafactor):
        params, opt_state = optimizer.apply(gradient, state.opt_state, state.params, keys(setting.seed, state.step),
                                            state.step, norm, finite)
        ema = jax.lax.cond(finite, lambda: average(setting, state.ema, state.step, params), lambda: state.ema)
        changed = params, opt_state, ema
    else:
        # A branch, and no choice between old and new numbers: that would hold both, 15 GB more on 8 devices.
        changed = jax.lax.cond(finite, update, lambda *old: old, state.params, state.opt_state, state.ema)
    skipped = 1 - finite.astype(jnp.int32)
    metrics = parts | {"loss": loss, "gradient_norm": norm, "skipped": skipped}
    return TrainState(state.step + 1, *changed, state.skipped + skipped), metrics


def _gradient(params: Any, setting: StepConfig, batch: Batch, noise: jax.Array, sigma: jax.Array, frozen: Any = None
              ) -> tuple[Any, jax.Array, jax.Array]:
    """The gradient of the loss in float32 (or the parameters' dtype, without accumulation), errors and weights."""
    total = total_weight(setting, batch)

    def part(carry, xs):
        def loss(params):
            errors, weights = velocity_errors(params, setting, *xs, frozen=frozen)
            return errors.sum() / total, (errors, weights)

        gradient, sums = jax.grad(loss, has_aux=True)(params)
        return gradient if carry is None else jax.tree.map(jnp.add, carry, gradient), sums

    if setting.accumulate == 1:
        return (lambda gradient, sums: (gradient, *sums))(*part(None, (batch, noise, sigma)))

    def split(x):  # every part has rows of every device: neighbours go to different parts
        return x.reshape(x.shape[0] // setting.accumulate, setting.accumulate, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    gradient, sums = jax.lax.scan(part, zeros, jax.tree.map(split, (batch, noise, sigma)))
    return gradient, *map(join, sums)
