"""What to change where a run does not fit, and what to do with memory that is left over."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from acejax.adapt.quantize import KINDS
from acejax.errors import UserError
from acejax.model import remat
from acejax.parallel.chips import Chip, slice_sizes
from acejax.train.config import TrainConfig
from acejax.train.plan_estimate import GB, Plan, estimate
from acejax.train.plan_memory import attention_of
from acejax.train.plan_remat import by_cost, using

ONE_CARD = {"name": "adafactor", "param_dtype": "bfloat16", "fused": True, "clip": 0.0, "accumulate": 1}
MOST = 1024  # devices that are tried
MOST_CPU = 64  # more, of what is in no table
LARGER = 16  # times the batch that is tried
LEAST = 0.0005  # share of a sample's time that is worth telling

Buckets = Mapping[int, int]  # samples of a batch by image tokens


@dataclasses.dataclass(frozen=True)
class Spare:
    """A use for memory that is left over.

    Attributes:
      change: what to set.
      total: bytes of a device that the largest step then takes.
      recomputed: FLOPs done twice, as a share of the model's; `before` without the change.
      faster: seconds that a sample takes less, as a share of those it takes now, by the plan's estimate.
    """

    change: str
    total: float
    recomputed: float
    before: float
    faster: float

    def __str__(self) -> str:
        again = "" if self.recomputed == self.before else (
            f"; recomputed FLOPs {self.before:.0%} -> {self.recomputed:.0%} of the model's")
        time = f"{self.faster:.1%} less" if self.faster >= LEAST else "no less"
        return f"{self.change}: {self.total / GB:.1f} GB{again}; {time} time a sample"


def advice(run: TrainConfig, found: Plan, buckets: Buckets, most: float | None = None) -> str:
    """The first change that makes a run fit, or take `most` bytes: alone, with those before it, or on more devices."""
    def fits(changed: TrainConfig, devices: int = found.devices, batch: Buckets = buckets) -> bool:
        try:
            made = estimate(changed, batch, found.text, found.chip, devices, found.efficiency, found.slices)
            return made.fits if most is None else made.largest.memory.total <= most
        except UserError:  # a mesh that can't be, a batch that does not fall into so many parts
            return False

    together, names = run, {}  # by field: the last value tried
    for name, change in _changes(run, found, buckets):
        if fits(change(run)):
            return f"{name} makes it fit"
        together = change(together)
        names[name.partition("=")[0]] = name
        if len(names) > 1 and fits(together):
            return f"{' and '.join(names.values())} make it fit"
    one_card = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, **ONE_CARD))
    if found.devices == 1 and run.lora is None and run.execution.remat == remat.FULL and fits(one_card):
        return f"config.optimizer of {', '.join(f'{name}={value}' for name, value in ONE_CARD.items())} makes it fit"
    also = f" with {' and '.join(names.values())}" if names else ""
    rows = _rows(run, found, buckets)
    for parts in (parts for parts in range(2, rows + 1) if rows % parts == 0):
        if fits(together, batch={tokens: count // parts for tokens, count in buckets.items()}):
            return f"a batch 1/{parts} as large{also} makes it fit"
    wider = dataclasses.replace(together, mesh={"data": found.slices, "fsdp": -1},
                                optimizer=dataclasses.replace(together.optimizer, fused=False))
    counts = _counts(found)
    fewer = [count for count in reversed(counts) if count < found.devices]  # where these do not divide the kernels
    more = [count for count in counts if count > found.devices]
    nearest = [next((count for count in side if fits(wider, count, _spread(found, buckets, count))), None)
               for side in (fewer, more)]
    if machines := [_named(found.chip, count, found.slices) for count in nearest if count]:
        return f"{' or '.join(machines)}, sharded over fsdp{also}, makes it fit"
    return "no setting and no number of these devices makes it fit"


def spare(run: TrainConfig, found: Plan, buckets: Buckets) -> tuple[Spare, ...]:
    """What else fits where a run does: less that is recomputed, a larger batch."""
    if found.chip is None or not found.fits:
        return ()
    uses = []
    if not run.optimizer.fused:  # which recomputes each block
        uses += _less_recomputed(run, found, buckets)
    uses += _first(found, buckets, run, "", range(LARGER, 1, -1))
    return tuple(uses)


def _less_recomputed(run: TrainConfig, found: Plan, buckets: Buckets) -> list[Spare]:
    """What recomputes the least at this batch, and a smaller batch with the least of all."""
    uses, less = [], _costs(run, found, buckets)[0]
    for setting in less:
        uses += _first(found, buckets, using(run, setting), f"config.execution.remat={setting}", (1,))
        if uses:
            break
    if less and not any(use.change.endswith(f"={less[0]}") for use in uses):
        rows = _rows(run, found, buckets)
        parts = [1 / parts for parts in range(2, rows + 1) if rows % parts == 0]
        uses += _first(found, buckets, using(run, less[0]), f"config.execution.remat={less[0]}", parts)
    return uses


def _costs(run: TrainConfig, found: Plan, buckets: Buckets) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Settings that recompute less than the run's, and those that recompute more, each from the least on."""
    costs = by_cost(run.model, buckets, found.text)
    here = run.execution.remat
    if here == remat.NONE:
        return (), costs
    place = costs.index(remat.setting(remat.names(here)))
    return costs[:place], costs[place + 1:]


def _first(found: Plan, buckets: Buckets, run: TrainConfig, change: str, scales: Iterable[float]) -> list[Spare]:
    """A changed run with the first of these batches that fits, in times of the plan's; nothing where none does."""
    for scale in scales:
        batch = {tokens: round(scale * count) for tokens, count in buckets.items()}
        made = estimate(run, batch, found.text, found.chip, found.devices, found.efficiency, found.slices)
        if not made.fits:
            continue
        size = f"a batch {scale:g} times as large" if scale > 1 else f"a batch 1/{1 / scale:.0f} as large"
        name = " with ".join(filter(None, (change, size if scale != 1 else "")))
        faster = 1 - made.largest.seconds / made.largest.samples / (found.largest.seconds / found.largest.samples)
        return [Spare(name, made.largest.memory.total, made.largest.recomputed, found.largest.recomputed, faster)]
    return []


def _changes(run: TrainConfig, found: Plan, buckets: Buckets) -> Iterator[tuple[str, Callable]]:
    def optimizer(**fields):
        return lambda run: dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, **fields))

    def execution(**fields):
        return lambda run: dataclasses.replace(run, execution=dataclasses.replace(run.execution, **fields))

    for setting in _costs(run, found, buckets)[1]:
        yield f"config.execution.remat={setting}", execution(remat=setting)
    fast = attention_of(execution(attention="auto")(run), found.largest.image + found.text, found.backend)
    if found.largest.attention != fast:
        yield f"config.execution.attention={fast}", execution(attention=fast)
    rows = math.gcd(*buckets.values()) // (found.mesh["data"] * found.mesh["fsdp"])
    for parts in range(2, rows + 1):
        if parts > run.optimizer.accumulate and rows % parts == 0 and not run.optimizer.fused:
            yield f"config.optimizer.accumulate={parts}", optimizer(accumulate=parts)
    if run.lora and run.lora.base not in KINDS:
        yield "config.lora.base=int8", lambda run: dataclasses.replace(
            run, lora=dataclasses.replace(run.lora, base="int8"))
    if found.mesh["fsdp"] * found.slices < found.devices:
        alone = {"fsdp": -1} if found.slices == 1 else {"data": found.slices, "fsdp": -1}
        name = "config.mesh of fsdp alone" + (f", and data={found.slices}" if found.slices > 1 else "")
        yield name, lambda run: dataclasses.replace(run, mesh=alone)
    if run.optimizer.ema:
        yield "config.optimizer.ema=0", optimizer(ema=0.0)


def _rows(run: TrainConfig, found: Plan, buckets: Buckets) -> int:
    """Samples of a device and a part of the batch, of which all buckets have a multiple."""
    return math.gcd(*buckets.values()) // (found.mesh["data"] * found.mesh["fsdp"] * run.optimizer.accumulate)


def _spread(found: Plan, buckets: Buckets, devices: int) -> dict[int, int]:
    """The batches over another number of devices, with as many samples on each as before."""
    before = found.mesh["data"] * found.mesh["fsdp"]
    return {tokens: count // before * devices for tokens, count in buckets.items()}


def _counts(found: Plan) -> list[int]:
    """Numbers of devices that can be had: of a domain every one, then whole domains; of a TPU the slices there are."""
    if found.chip is None:
        return list(range(1, found.devices + MOST_CPU))
    if found.chip.torus:
        return [size * found.slices for size in slice_sizes(found.chip)]
    domain = found.chip.domain
    return [*range(1, domain + 1), *range(2 * domain, max(MOST, found.devices) + 1, domain)]


def _named(chip: Chip | None, devices: int, slices: int) -> str:
    """The name of so many devices, as topologies have it."""
    if chip is None:
        return f"a mesh of {devices} devices"
    if not chip.torus:
        return f"{chip.name}x{devices}"
    return f"{chip.name}-{devices // slices * chip.cores}" + (f"x{slices}" if slices > 1 else "")
