"""The validation loss: held-out samples at fixed noise and fixed noise levels, so that numbers can be compared."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acejax.data.subset import Subset
from acejax.train.config import ValidationConfig
from acejax.train.held import Held
from acejax.train.samples import Decode, Samples
from acejax.train.step import Batch, StepConfig, velocity_errors


class Losses:
    """The training loss of held-out samples, over all of them: samples, noise and noise levels never change.

    Squared errors are summed sample by sample on the devices and added up on the host in the samples' order, so steps,
    meshes and batches give one number but for the rounding inside the network.

    Args:
      setting: of the training step; its loss is what is measured.
      held: the samples.
      sigmas: noise levels, each of which every sample is seen at.
      mesh: of the parameters.
      frozen: what a LoRA is trained on (`acejax.train.step.whole`).
    """

    def __init__(self, setting: StepConfig, held: Held, sigmas: Sequence[float], mesh: Mesh, frozen: Any = None):
        self._held, self._sigmas, self._frozen = held, tuple(sigmas), frozen
        self._batches = held.batches(range(len(held.table)))
        self._run = jax.jit(functools.partial(_errors, setting=setting, sigmas=self._sigmas),
                            out_shardings=NamedSharding(mesh, PartitionSpec()))  # every process sees all of it

    def __call__(self, params: Any) -> dict[str, float]:
        """`validation/loss`, `validation/task/NAME`, `validation/sigma/0.1`, `validation/L_ref/1`, `validation/L_tar`:
        means over everything that counts, equally over sigmas. What no sample has is left out.
        """
        table = self._held.table
        made: list[tuple[jax.Array, jax.Array]] = []
        for batch in self._batches:
            made.append(self._run(params, self._held.feed(batch), self._frozen))
            jax.block_until_ready(made[-2:-1])  # the next batch is read while this one is computed, but no further
        units = made[0][1].shape[-1]
        errors, counts = np.zeros((len(self._sigmas), len(table), units)), np.zeros((len(table), units))
        for batch, (error, count) in zip(self._batches, jax.device_get(made), strict=True):
            rows = np.array(batch.samples)
            errors[:, rows], counts[rows] = error[:, :len(rows)], count[:len(rows)]

        def mean(which: Any = slice(None), unit: Any = slice(None), sigma: Any = slice(None)) -> float | None:
            weight = counts[which][:, unit].sum()
            return float(errors[sigma][:, which][..., unit].sum((1, 2)).mean() / weight) if weight else None

        values = {"loss": mean()}
        values |= {f"task/{name}": mean(which=table.task == number) for number, name in enumerate(table.tasks)}
        values |= {f"sigma/{sigma:g}": mean(sigma=[place]) for place, sigma in enumerate(self._sigmas)}
        values |= {f"L_ref/{unit + 1}": mean(unit=[unit]) for unit in range(units - 1)} | {"L_tar": mean(unit=[-1])}
        return {f"validation/{name}": value for name, value in values.items() if value is not None}


def _errors(params: Any, batch: Batch, frozen: Any, *, setting: StepConfig, sigmas: tuple[float, ...]
            ) -> tuple[jax.Array, jax.Array]:
    """Squared errors [sigmas, B, units] of a batch with `noise`, and the weights [B, units] that they have."""
    def at(sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        return velocity_errors(params, setting, batch, batch["noise"], jnp.full(batch["lengths"].shape, sigma), frozen)

    errors, counts = jax.lax.map(at, jnp.array(sigmas, jnp.float32))  # one level at a time: one level's memory
    return errors, counts[0]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a run is judged on.

    Attributes:
      table: the samples.
      decode: latents [h, w, 16] -> picture [8h, 8w, 3] uint8; None draws no samples.
      prompt: a sample's, from its index in the whole table; shown under it.
    """

    table: Subset
    decode: Decode | None = None
    prompt: Callable[[int], str] = lambda index: ""


class Validation:
    """Losses and, where latents can be decoded, samples of what was held out.

    Args:
      setting: of the training step.
      config: what of it, and how.
      held_out: the samples.
      mesh: of the parameters.
      batch_sizes: of training, by bucket.
      seed: of noise and draws.
      frozen: what a LoRA is trained on (`acejax.train.step.whole`).
    """

    def __init__(self, setting: StepConfig, config: ValidationConfig, held_out: HeldOut, mesh: Mesh,
                 batch_sizes: Mapping[int, int], seed: int, frozen: Any = None):
        most = int(held_out.table.references.max())  # training may have fewer
        setting = dataclasses.replace(setting, references=max(setting.references, most))
        parts = {bucket: size // setting.accumulate for bucket, size in batch_sizes.items()}  # what training computes
        held = Held(held_out.table, mesh, parts, seed)
        self.losses = Losses(setting, held, config.sigmas, mesh, frozen)
        self._samples = None if held_out.decode is None else Samples(
            setting, held, config.grid, config.steps, config.guidance, mesh, held_out.decode, held_out.prompt,
            frozen)

    def samples(self, params: Any) -> tuple[dict[str, float], np.ndarray | None]:
        """As `Samples`; ({}, None) without a decoder."""
        return ({}, None) if self._samples is None else self._samples(params)
