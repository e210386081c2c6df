"""acejax's side of `benchmarks.gpu`: the programs that the sampler and the trainer run, on random weights."""

import functools
import importlib.metadata
import time
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from acejax import flow
from acejax.edit.sampler import sample, split
from acejax.model import modulation
from acejax.model.config import Execution
from acejax.train import lora
from acejax.train.config import LoraConfig, OptimizerConfig
from acejax.train.fused import fused_step
from acejax.train.optimizer import make_optimizer
from acejax.train.step import StepConfig, init_state, train_step
from benchmarks import gpu_inputs
from benchmarks.gpu_side import LEVELS, RANK, Ready, Work

BATCHES = 3  # that training steps take turns with


def denoise(work: Work) -> Ready:
    """One Euler step of the sampler after the other, each from what the last one made, at the next noise level."""
    config, execution = work.config, _execution(work)
    size = gpu_inputs.grid(work.tokens)
    features = jax.tree.map(jnp.asarray, gpu_inputs.features(config, work.samples, size, work.text, execution.dtype))
    trees = {"params": gpu_inputs.weights(config, execution.dtype), "lora": None, "quant": None}
    first, rest = split(trees)
    sigmas = flow.schedule(LEVELS, work.tokens)
    levels = jnp.broadcast_to(sigmas[:-1, None], (LEVELS, work.samples))
    pooled, latents = features.pop("pooled"), features.pop("noise")
    made = jax.jit(functools.partial(modulation.modulations, config, execution=execution))(
        first["params"], levels, pooled, jnp.full(work.samples, 4.0))
    del first, trees

    def one(rest, features, latents, sigmas, made, level):
        of_level = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, level, 1), made)
        pair = jax.lax.dynamic_slice_in_dim(sigmas, level, 2)
        return sample(config, execution, None, rest, features | {"noise": latents}, pair, of_level)

    run, facts = _compiled(jax.jit(one), rest, features, latents, sigmas, made, jnp.int32(0))

    def step(number: int) -> jax.Array:
        nonlocal latents
        latents = jax.block_until_ready(run(rest, features, latents, sigmas, made, jnp.int32(number % LEVELS)))
        return latents

    return _ready(step, facts | {"attention": execution.attention, "modulation": "beforehand"})


def train_lora(work: Work, base: str = "bfloat16") -> Ready:
    """AdamW on a LoRA's float32 factors, beside a base that is frozen."""
    config = work.config
    settings = LoraConfig(min(RANK, config.hidden_size), base=base)
    held = gpu_inputs.weights(config, lora.held_dtype(settings), lora.hold(settings, config))
    factors, scales = jax.jit(lambda: lora.factors(settings, config, 0))()
    optimizer = OptimizerConfig(1e-4)
    return _training(work, train_step, optimizer, factors, lora.split(held) | {"scales": scales}, {
        "base": base, "rank": settings.rank, "optimizer": "AdamW, float32 factors"})


def train_full(work: Work, fused: bool = True) -> Ready:
    """Adafactor on bfloat16 parameters with stochastic rounding; fused, no gradient of the whole model ever is."""
    optimizer = OptimizerConfig(1e-5, name="adafactor", param_dtype="bfloat16", fused=fused, clip=0.0 if fused else 1.0)
    params = gpu_inputs.weights(work.config, jnp.bfloat16)
    return _training(work, fused_step if fused else train_step, optimizer, params, None, {
        "optimizer": f"Adafactor, bfloat16, stochastic rounding, {'fused' if fused else 'with a gradient tree'}"})


def _training(work: Work, advance: Any, optimizer: OptimizerConfig, params: Any, frozen: Any, facts: dict[str, Any]
              ) -> Ready:
    execution = _execution(work, remat=work.remat)
    setting = StepConfig(work.config, execution, references=0, tasks=1, mask_weight=1.0, sigma_shift=0.0,
                         sigma_spread=1.0, seed=0, param_dtype=optimizer.param_dtype)
    moves = make_optimizer(optimizer, 1000)
    state = jax.jit(functools.partial(init_state, setting, moves), donate_argnums=0)(params)
    del params
    batches = [jax.tree.map(jnp.asarray, gpu_inputs.batch(
        work.config, work.samples, gpu_inputs.grid(work.tokens), work.text, jnp.bfloat16, seed))
        for seed in range(BATCHES)]
    jitted = jax.jit(functools.partial(advance, setting=setting, optimizer=moves), donate_argnums=0)
    run, found = _compiled(jitted, state, batches[0], frozen=frozen)

    def step(number: int) -> jax.Array:
        nonlocal state
        state, metrics = jax.block_until_ready(run(state, batches[number % BATCHES], frozen=frozen))
        return metrics["loss"]

    return _ready(step, found | facts | {"attention": execution.attention, "remat": execution.remat})


def _execution(work: Work, **changes: Any) -> Execution:
    platform = jax.default_backend()
    if platform != "gpu":
        changes |= {"dtype": jnp.bfloat16, "attention": "xla"}
    return Execution.for_platform(platform, **changes)


def _compiled(jitted: Any, *inputs: Any, **named: Any) -> tuple[Any, dict[str, Any]]:
    """The program for these inputs, and what compiling took and XLA plans for it."""
    begin = time.perf_counter()
    program = jitted.lower(*inputs, **named).compile()
    facts, memory = {"compile_s": time.perf_counter() - begin}, program.memory_analysis()
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        facts["xla_gb"] = (held + memory.temp_size_in_bytes) / 1e9
    return program, facts


def _ready(step: Any, facts: dict[str, Any]) -> Ready:
    device = jax.devices()[0]
    return Ready(step, device.device_kind if jax.default_backend() == "gpu" else None,
                 lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, facts)


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return found | {"xla_platform": jax.extend.backend.get_backend().platform_version.replace("\n", " ")}


PARTS = {"step": denoise, "lora": train_lora, "qlora": functools.partial(train_lora, base="int8"),
         "fused": train_full, "unfused": functools.partial(train_full, fused=False)}
