"""What a run needs before it starts: memory of a device, FLOPs and seconds of a step, in closed form.

Memory is `acejax.train.plan_memory`, seconds `plan_time`, what is recomputed `plan_remat`, advice `plan_advice`, the
run as a whole `plan_run`.
"""

import dataclasses
import math
from collections.abc import Mapping

from acejax.errors import UserError
from acejax.parallel.chips import Chip
from acejax.train.config import TrainConfig
from acejax.train.plan_advice import ONE_CARD, advice
from acejax.train.plan_estimate import GB, Plan, Step, estimate
from acejax.train.plan_remat import settled

__all__ = ["GB", "ONE_CARD", "Plan", "Step", "plan", "remedy", "settled"]


def plan(run: TrainConfig, buckets: Mapping[int, int], text: int, chip: Chip | None, devices: int,
         efficiency: float | None = None, slices: int = 1) -> Plan:
    """Plan a run on so many devices.

    Args:
      run: its config; `execution.remat="auto"` is settled first.
      buckets: samples of a batch, over all devices, by image tokens.
      text: text tokens of a sample.
      chip: what the devices are; None for a CPU, of which XLA's own layout is told.
      devices: how many, of all slices.
      efficiency: share of the peak that the products reach; None is the chip's (`plan_time.efficiency_of`).
      slices: of a TPU; the slow network between them carries the mesh's `data` axis alone.

    Raises:
      UserError: a mesh or a batch that does not fall over the devices, a `data` axis that does not fall over the
        slices, or an efficiency that is none.
    """
    run = settled(run, buckets, text, chip, devices, slices)
    if efficiency is not None and not 0 < efficiency <= 1:
        raise UserError(f"efficiency is {efficiency}; expected a share of the peak, above 0 up to 1")
    found = estimate(run, buckets, text, chip, devices, efficiency, slices)
    return found if found.fits else dataclasses.replace(found, advice=advice(run, found, buckets))


def remedy(run: TrainConfig, found: Plan, buckets: Mapping[int, int]) -> str:
    """What would make a run fit whose devices have had too little memory, whatever was planned: a tenth less."""
    least = min(0.9 * found.largest.memory.total, math.inf if found.capacity is None else found.capacity)
    return advice(run, found, buckets, least)
