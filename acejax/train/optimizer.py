"""The optimizer and its learning rate, from a config; both are functions of the step alone."""

from collections.abc import Mapping
from typing import Any

import optax


def learning_rate(config: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` of the run, then cosine to zero at its end."""
    return optax.warmup_cosine_decay_schedule(0.0, config["learning_rate"], round(config["warmup"] * steps), steps)


def make_optimizer(config: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """AdamW with float32 moments after clipping by the global norm.

    `config` has learning_rate, warmup (share of the steps), b1, b2, weight_decay and clip.
    """
    return optax.chain(
        optax.clip_by_global_norm(config["clip"]),
        optax.adamw(learning_rate(config, steps), b1=config["b1"], b2=config["b2"],
                    weight_decay=config["weight_decay"]))
