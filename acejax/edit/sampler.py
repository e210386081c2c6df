"""The sampler: noise to latents, as one compiled loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from acejax import flow, lcu
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.mmdit import Tokens, apply


class Sampler:
    """Latents of canvases, by Euler steps."""

    def __init__(self, config: MMDiTConfig, params: Any, *, quant: Any = None, execution: Execution = Execution()):
        self._params, self._quant = params, quant
        self._sample = jax.jit(functools.partial(_sample, config, execution), static_argnames="steps")

    def __call__(self, features: dict[str, jax.Array], noise: jax.Array, steps: int, guidance: float | None,
                 lora: Any = None) -> jax.Array:
        """Latents [B, h, w, 16] of canvases' features (`acejax.data.latents.encode`, text and pooled) and noise."""
        return self._sample(self._params, self._quant, lora, jax.tree.map(jnp.asarray, features), noise,
                            None if guidance is None else jnp.float32(guidance), steps=steps)


def _sample(config: MMDiTConfig, execution: Execution, params: Any, quant: Any, lora: Any,
            features: dict[str, jax.Array], noise: jax.Array, guidance: jax.Array | None, *, steps: int) -> jax.Array:
    batch, height, width, _ = noise.shape
    full = None if guidance is None else jnp.full((batch,), guidance)

    def velocity(latents, sigma):
        conditions = (features[name] for name in ("edit", "mask", "modify") if name in features)
        image, positions = lcu.pack(latents, *conditions)
        tokens = Tokens(image, positions, features["text"], features["pooled"], jnp.full((batch,), sigma), full)
        return lcu.unpack(apply(config, params, tokens, lora=lora, quant=quant, execution=execution), height, width)

    return flow.euler(velocity, noise, flow.schedule(steps, height * width // lcu.PATCH**2))
