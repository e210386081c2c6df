"""What a run recomputes where its config leaves that to the plan: as little as the devices have room for."""

import dataclasses
from collections.abc import Mapping

from acejax.model import remat
from acejax.model.config import MMDiTConfig
from acejax.parallel.chips import Chip
from acejax.train.config import AUTO, TrainConfig
from acejax.train.plan_estimate import estimate

ROOM = 0.95  # of what a device holds: the plan is within 5 % of the compilers that it was held against


def settled(run: TrainConfig, buckets: Mapping[int, int], text: int, chip: Chip | None, devices: int, slices: int = 1
            ) -> TrainConfig:
    """A run whose `execution.remat` is "auto" with a setting in its place; any other run as it is.

    It is the set of named activations (`acejax.model.remat.settings`) that recomputes the fewest FLOPs of those whose
    planned memory fits. It is "full", which takes the least memory, where none does, where nothing is known of the
    devices' memory (a CPU, a GPU that is in no table), and in a fused step, which has no other.

    Nothing goes to the host's memory unless a config says so: what is saved there is waited for in the backward pass by
    the schedules that a TPU's compiler makes (docs/chips.md), and no GPU has run it.

    Args:
      buckets, text, chip, devices, slices: as `acejax.train.plan.plan` takes them.

    Raises:
      UserError: as `acejax.train.plan.plan`.
    """
    if run.execution.remat != AUTO:
        return run
    if chip is None or run.optimizer.fused:
        return using(run, remat.FULL)
    for setting in by_cost(run.model, buckets, text):
        made = estimate(using(run, setting), buckets, text, chip, devices, efficiency=1.0, slices=slices)
        if made.largest.memory.total <= ROOM * made.capacity:
            return using(run, setting)
    return using(run, remat.FULL)


def using(run: TrainConfig, setting: str) -> TrainConfig:
    """The run with this `execution.remat`."""
    return dataclasses.replace(run, execution=dataclasses.replace(run.execution, remat=setting))


def by_cost(model: MMDiTConfig, buckets: Mapping[int, int], text: int) -> tuple[str, ...]:
    """All sets, those that recompute the fewest FLOPs first, in a step of each bucket together; of equal ones that
    which saves less."""
    def cost(setting: str) -> tuple[float, float]:
        kept = sum(model.depth * double + model.depth_single_blocks * single
                   for double, single in remat.values(model, setting).values())
        spared = sum(samples * remat.flops(model, setting, image + text) for image, samples in buckets.items())
        return -spared, kept

    return tuple(sorted(remat.settings(), key=cost))
