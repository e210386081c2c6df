"""A run on so many devices in numbers: memory, FLOPs and seconds of each bucket's step, as a line and as a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh

from acejax.errors import UserError
from acejax.model import flops, remat
from acejax.parallel import rules
from acejax.parallel.chips import Chip
from acejax.parallel.mesh import abstract_mesh
from acejax.train import lora
from acejax.train.config import TrainConfig
from acejax.train.plan_memory import Memory, attention_of, memory, offloaded
from acejax.train.plan_time import efficiency_of, times

USABLE = 0.95  # of a device's memory where its compiler names no limit; the runtime takes some
GB, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of one bucket.

    Attributes:
      image: tokens of a sample, padding included.
      samples: of a batch, over all devices.
      tokens: of a batch, text included.
      attention: the implementation.
      flops: of the model, over all devices: what MFU counts.
      hardware_flops: with what remat and attention's backward pass recompute.
      memory: of one device.
      offloaded: bytes of the host's memory that one device fills.
      compute, links, network, reading, exposed: seconds at the plan's efficiency (`acejax.train.plan_time`), None
        without a chip.
      mfu: model FLOPs by the chip's peak in the step's time.
    """

    image: int
    samples: int
    tokens: int
    attention: str
    flops: float
    hardware_flops: float
    memory: Memory
    offloaded: float = 0.0
    compute: float | None = None
    links: float | None = None
    network: float | None = None
    reading: float | None = None
    exposed: float | None = None
    mfu: float | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.compute is None else self.compute + self.exposed

    @property
    def recomputed(self) -> float:
        """FLOPs that are done twice, as a share of the model's."""
        return self.hardware_flops / self.flops - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      chip: None is a CPU, of which no time is told and that holds all.
      devices: how many, of all slices.
      slices: of a TPU.
      mesh: size of each axis.
      backend: the compiler that is modelled: "cpu", "gpu" or "tpu".
      text: text tokens of a sample.
      efficiency: share of the peak that products reach.
      efficiency_from: where that is from (`acejax.train.plan_time`).
      steps: of each bucket, the largest first.
      advice: what would make it fit, or "".
    """

    chip: Chip | None
    devices: int
    slices: int
    mesh: Mapping[str, int]
    backend: str
    remat: str
    text: int
    efficiency: float
    efficiency_from: str
    steps: tuple[Step, ...]
    advice: str = ""

    @property
    def largest(self) -> Step:
        return self.steps[0]

    @property
    def capacity(self) -> float | None:
        """Bytes of a device that a step may take: the compiler's limit, or a share of what is there."""
        return None if self.chip is None else self.chip.limit or USABLE * self.chip.hbm

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.largest.memory.total <= self.capacity

    def line(self) -> str:
        """The plan in a line, as training prints it."""
        step, name = self.largest, "cpu" if self.chip is None else self.chip.name
        there = "" if self.chip is None else f" of {self.chip.hbm / GB:.0f}"
        parts = [f"plan: {self.devices} {name} ({self._arranged()})",
                 f"{step.samples} samples of {step.image}+{self.text} tokens",
                 f"{step.memory.total / GB:.2f}{there} GB a device"]
        if step.seconds is not None:
            parts.append(f"{step.seconds:.2f} s a step at {self.efficiency:.0%} of the peak "
                         f"({self.efficiency_from}), MFU {step.mfu:.0%}")
        parts.append(f"{step.flops / TERA:.3g} TFLOP a step, {step.attention} attention, remat {self.remat}")
        return "; ".join(parts + ([] if self.fits else [f"does not fit: {self.advice}"]))

    def _arranged(self) -> str:
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        chips = [f"{self.devices // self.chip.devices} chips"] if self.chip and self.chip.devices > 1 else []
        slices = [f"{self.slices} slices"] if self.slices > 1 else []
        return ", ".join([*slices, *chips, axes])

    def table(self) -> str:
        """Memory of a device, and the step of each bucket."""
        held = self.largest.memory
        lines = [self.line(), "", f"memory of one device in GB, largest step, as XLA for {self.backend} lays it out:"]
        for field in dataclasses.fields(Memory):
            if value := getattr(held, field.name):
                lines.append(f"  {field.name:<14}{value / GB:9.3f}")
        room = "" if self.capacity is None else f"; {self.capacity / GB:.2f} can be used"
        lines.append(f"  {'in all':<14}{held.total / GB:9.3f}  ({held.arguments / GB:.3f} given to the step, "
                     f"{held.temporaries / GB:.3f} beside it{room})")
        lines += [self._offloaded()] if self.largest.offloaded else []
        if self.chip is None:
            lines += ["", "a step of each bucket:"]
        else:
            lines += ["", "a step of each bucket; seconds are estimates, with products at "
                          f"{self.efficiency:.0%} of the peak ({self.efficiency_from})",
                      "(step = compute + what of links and network is exposed, not hidden behind it):"]
        lines.append(f"{'image tokens':>12} {'samples':>7} {'TFLOP':>9} {'recomputed':>10} {'GB':>7} {'compute':>8} "
                     f"{'links':>7} {'network':>7} {'exposed':>7} {'step s':>7} {'tokens/s':>9} {'MFU':>5}")
        lines += [self._row(step) for step in self.steps]
        return "\n".join(lines)

    def _offloaded(self) -> str:
        step = self.largest
        line = f"  in the host's memory {step.offloaded / GB:.3f} for each device"
        if self.chip is None:
            return line
        if not self.chip.host_link:
            return line + "; how fast it comes back is not known of this chip, and no seconds are counted for it"
        return line + f"; {step.reading:.3f} s for it to come back, which are counted as exposed"

    def _row(self, step: Step) -> str:
        told = (f"{step.image:12} {step.samples:7} {step.flops / TERA:9.1f} {step.recomputed:10.1%} "
                f"{step.memory.total / GB:7.2f} ")
        if step.seconds is None:
            return told + f"{'-':>8} {'-':>7} {'-':>7} {'-':>7} {'-':>7} {'-':>9} {'-':>5}"
        return told + (f"{step.compute:8.3f} {step.links:7.3f} {step.network:7.3f} {step.exposed:7.3f} "
                       f"{step.seconds:7.3f} {step.tokens / step.seconds:9.0f} {step.mfu:5.1%}")

    def to_json(self) -> dict[str, Any]:
        """All of it, with what follows from it."""
        found = dataclasses.asdict(self) | {"fits": self.fits, "capacity": self.capacity}
        for row, step in zip(found["steps"], self.steps, strict=True):
            row |= {"seconds": step.seconds, "recomputed": step.recomputed}
            row["memory"] = row["memory"] | {"total": step.memory.total}
        return found


def estimate(run: TrainConfig, buckets: Mapping[int, int], text: int, chip: Chip | None, devices: int,
             efficiency: float | None, slices: int = 1) -> Plan:
    """A run on so many devices, fitting or not; arguments and errors as `acejax.train.plan.plan`, without advice."""
    mesh = abstract_mesh(run.mesh, devices)
    run.check_devices(devices)
    check_slices(mesh, slices)
    rules.check_heads(mesh, run.model.num_heads)
    rules.check_tokens(mesh, "text", text)
    backend = "cpu" if chip is None else chip.platform
    domain = devices // slices if chip is None or chip.torus else chip.domain
    share, origin = efficiency_of(chip, efficiency)
    steps = []
    for image, samples in buckets.items():
        rules.check_batch(mesh, samples, run.optimizer.accumulate)
        rules.check_tokens(mesh, "image", image)
        step = _step(run, mesh, image, samples, text, backend, slices)
        if chip is not None:
            taken = times(run, mesh, samples, text + image, step.hardware_flops, chip, share, domain,
                          step.offloaded)
            seconds = taken.compute + taken.exposed
            step = dataclasses.replace(step, **dataclasses.asdict(taken),
                                       mfu=step.flops / (devices * chip.flops * seconds))
        steps.append(step)
    steps.sort(key=lambda step: step.memory.total, reverse=True)
    return Plan(chip, devices, slices, dict(mesh.shape), backend, run.execution.remat, text, share, origin,
                tuple(steps))


def check_slices(mesh: AbstractMesh, slices: int) -> None:
    """Raises UserError when something else than gradients (`data`) would go over the slow network between slices."""
    if mesh.shape["data"] % slices == 0:
        return
    inner = mesh.shape["tensor"] * mesh.shape["seq"]
    works = f"data={slices}" if mesh.size % (slices * inner) else (
        f"--config.mesh.data={slices} with --config.mesh.fsdp={mesh.size // (slices * inner)} or -1")
    raise UserError(f"config.mesh: data is {mesh.shape['data']} over {slices} slices, and fsdp, tensor and seq must "
                    f"not go over the slow network between them; expected data a multiple of {slices}: {works}")


def _step(run: TrainConfig, mesh: AbstractMesh, image: int, samples: int, text: int, backend: str, slices: int
          ) -> Step:
    """Memory and FLOPs of a bucket's step."""
    once = flops.forward(run.model, text, image, samples)
    pairs = run.lora and lora.pairs(run.lora, run.model)
    model = flops.training_step(run.model, text, image, samples, pairs)
    added = flops.low_rank(pairs, text, image, samples) if pairs and run.execution.remat != remat.NONE else 0
    hardware = model + added + _recomputed(run, once, samples, text + image, backend)
    return Step(image, samples, samples * (text + image), attention_of(run, text + image, backend), model,
                hardware, memory(run, mesh, samples, image, text, backend, slices),
                offloaded(run, mesh, samples, text + image))


def _recomputed(run: TrainConfig, once: flops.Flops, samples: int, tokens: int, backend: str) -> float:
    """FLOPs done twice: by remat, and q k^T in the backward pass of an attention that keeps no logits."""
    setting = run.execution.remat
    again = 0 if setting == remat.NONE else once.total - samples * remat.flops(run.model, setting, tokens)
    if attention_of(run, tokens, backend) != "xla":
        return again + once.attention / 2
    remade = setting != remat.NONE and remat.ATTENTION in remat.names(setting)  # the weights of a saved result
    return again + (once.attention / 2 if remade else 0)
