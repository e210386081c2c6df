"""What a run needs before it starts: memory of a device, FLOPs and seconds of a step, in closed form.

Memory is `acejax.train.plan_memory`. A step takes the longer of its products, at the stated share of the chip's peak
(`efficiency`, recomputed products included), and of its communication over the chip's links, as if they overlapped.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

from acejax.adapt.quantize import KINDS
from acejax.errors import UserError
from acejax.model import flops
from acejax.parallel import rules
from acejax.parallel.chips import Chip
from acejax.parallel.mesh import AXES, abstract_mesh
from acejax.train import lora
from acejax.train.config import TrainConfig
from acejax.train.plan_memory import Memory, attention_of, memory, state_bytes

USABLE = 0.95  # of a device's memory; the runtime takes some
GB, TERA = 1e9, 1e12
ONE_CARD = {"name": "adafactor", "param_dtype": "bfloat16", "fused": True, "clip": 0.0, "accumulate": 1}


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
      compute, communication: seconds at the plan's efficiency, None without a chip.
      mfu: model FLOPs by the chip's peak in the step's time.
    """

    image: int
    samples: int
    tokens: int
    attention: str
    flops: float
    hardware_flops: float
    memory: Memory
    compute: float | None = None
    communication: float | None = None
    mfu: float | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.compute is None else max(self.compute, self.communication)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
      chip: None is a CPU, of which no time is told and that holds all.
      devices: how many.
      mesh: size of each axis.
      backend: the compiler that is modelled: "cpu", "gpu" or "tpu".
      text: text tokens of a sample.
      steps: of each bucket, the largest first.
      advice: what would make it fit, or "".
    """

    chip: Chip | None
    devices: int
    mesh: Mapping[str, int]
    backend: str
    remat: str
    text: int
    efficiency: float
    steps: tuple[Step, ...]
    advice: str = ""

    @property
    def largest(self) -> Step:
        return self.steps[0]

    @property
    def fits(self) -> bool:
        return self.chip is None or self.largest.memory.total <= USABLE * self.chip.hbm

    def line(self) -> str:
        """The plan in a line, as training prints it."""
        step, name = self.largest, "cpu" if self.chip is None else self.chip.name
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        there = "" if self.chip is None else f" of {self.chip.hbm / GB:.0f}"
        parts = [f"plan: {self.devices} {name} ({axes})", f"{step.samples} samples of {step.image}+{self.text} tokens",
                 f"{step.memory.total / GB:.2f}{there} GB a device"]
        if step.seconds is not None:
            parts.append(f"{step.seconds:.2f} s a step at {self.efficiency:.0%}, MFU {step.mfu:.0%}")
        parts.append(f"{step.flops / TERA:.3g} TFLOP a step, {step.attention} attention, remat {self.remat}")
        return "; ".join(parts + ([] if self.fits else [f"does not fit: {self.advice}"]))

    def table(self) -> str:
        """The plan in full."""
        held = self.largest.memory
        lines = [self.line(), "", f"memory of one device in GB, largest step, as XLA for {self.backend} lays it out:"]
        for field in dataclasses.fields(Memory):
            if value := getattr(held, field.name):
                lines.append(f"  {field.name:<14}{value / GB:9.3f}")
        lines += [f"  {'in all':<14}{held.total / GB:9.3f}  ({held.arguments / GB:.3f} given to the step, "
                  f"{held.temporaries / GB:.3f} beside it)", "",
                  f"{'image tokens':>12} {'samples':>8} {'tokens':>9} {'TFLOP':>9} {'recomputed':>10} {'GB':>7} "
                  f"{'compute s':>9} {'links s':>8} {'tokens/s':>9} {'MFU':>5}"]
        for step in self.steps:
            times = (f"{step.compute:9.3f} {step.communication:8.3f} {step.tokens / step.seconds:9.0f} {step.mfu:5.1%}"
                     if step.seconds else f"{'-':>9} {'-':>8} {'-':>9} {'-':>5}")
            lines.append(f"{step.image:12} {step.samples:8} {step.tokens:9} {step.flops / TERA:9.1f} "
                         f"{step.hardware_flops / step.flops - 1:10.1%} {step.memory.total / GB:7.2f} {times}")
        return "\n".join(lines)


def plan(run: TrainConfig, buckets: Mapping[int, int], text: int, chip: Chip | None, devices: int,
         efficiency: float = 0.5) -> Plan:
    """Plan a run on so many devices.

    Args:
      run: its config.
      buckets: samples of a batch, over all devices, by image tokens.
      text: text tokens of a sample.
      chip: what the devices are; None for a CPU, of which XLA's own layout is told.
      devices: how many.
      efficiency: share of the peak that the products reach.

    Raises:
      UserError: a mesh or a batch that does not fall over the devices, or an efficiency that is none.
    """
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency is {efficiency}; expected a share of the peak, above 0 up to 1")
    found = _plan(run, buckets, text, chip, devices, efficiency)
    return found if found.fits else dataclasses.replace(found, advice=_advice(run, found, buckets))


def _plan(run: TrainConfig, buckets: Mapping[int, int], text: int, chip: Chip | None, devices: int,
          efficiency: float) -> Plan:
    mesh = abstract_mesh(run.mesh, devices)
    run.check_devices(devices)
    rules.check_heads(mesh, run.model.num_heads)
    rules.check_tokens(mesh, "text", text)
    backend = "cpu" if chip is None else chip.platform
    steps = []
    for image, samples in buckets.items():
        rules.check_batch(mesh, samples, run.optimizer.accumulate)
        rules.check_tokens(mesh, "image", image)
        held = memory(run, mesh, samples, image, text, backend)
        once = flops.forward(run.model, text, image, samples)
        pairs = run.lora and lora.pairs(run.lora, run.model)
        model = flops.training_step(run.model, text, image, samples, pairs)
        added = flops.low_rank(pairs, text, image, samples) if pairs and run.execution.remat != "none" else 0
        hardware = model + added + _recomputed(run, once, text + image, backend)
        step = Step(image, samples, samples * (text + image), attention_of(run, text + image, backend),
                    model, hardware, held)
        if chip is not None:
            compute = hardware / (devices * chip.flops * efficiency)
            communication = _sent(run, mesh, samples, text + image) / chip.link
            step = dataclasses.replace(step, compute=compute, communication=communication,
                                       mfu=model / (devices * chip.flops * max(compute, communication)))
        steps.append(step)
    steps.sort(key=lambda step: step.memory.total, reverse=True)
    return Plan(chip, devices, dict(mesh.shape), backend, run.execution.remat, text, efficiency, tuple(steps))


def _recomputed(run: TrainConfig, once: flops.Flops, tokens: int, backend: str) -> float:
    """FLOPs done twice: by remat, and q k^T in the backward pass of an attention that keeps no logits."""
    again = {"none": 0, "full": once.total, "attention": once.total - once.attention}[run.execution.remat]
    return again + (0 if attention_of(run, tokens, backend) == "xla" else once.attention / 2)


def _sent(run: TrainConfig, mesh, samples: int, tokens: int) -> float:
    """Bytes that a device sends in a step, all in the activations' dtype.

    Over fsdp, of n devices: each part of a batch gathers the weights for its forward and for its backward pass and
    reduces the gradients, each (n - 1) / n of them; what a LoRA is trained on has none. Over data: a gradient is
    reduced and told, each once. Over tensor: an activation is summed twice a block, forward, backward and recomputed.
    Over seq: q, k, v and the result change between tokens and heads.
    """
    size = 2 if run.execution.dtype == "bfloat16" else 4
    data, fsdp, tensor, seq = (mesh.shape[axis] for axis in AXES)
    kept = 2 if run.optimizer.param_dtype == "bfloat16" else 4
    frozen, trained, _ = state_bytes(run.model, run.lora, run.optimizer, abstract_mesh({}, 1))
    parameters, frozen = size * trained / kept / tensor, frozen / tensor
    activation = size * samples / (data * fsdp) * tokens / seq * run.model.hidden_size
    blocks, passes = run.model.depth + run.model.depth_single_blocks, 2 if run.execution.remat == "none" else 3
    return ((3 * parameters + 2 * frozen) * run.optimizer.accumulate * (fsdp - 1) / fsdp
            + 2 * parameters / fsdp * (data - 1) / data
            + 2 * 2 * passes * blocks * activation * (tensor - 1) / tensor
            + 4 * passes * blocks * activation / tensor * (seq - 1) / seq)


def remedy(run: TrainConfig, found: Plan, buckets: Mapping[int, int]) -> str:
    """What would make a run fit whose devices have had too little memory, whatever was planned: a tenth less."""
    least = min(0.9 * found.largest.memory.total, USABLE * (math.inf if found.chip is None else found.chip.hbm))
    return _advice(run, found, buckets, least)


def _advice(run: TrainConfig, found: Plan, buckets: Mapping[int, int], most: float | None = None) -> str:
    """The first change that makes a run fit, or take `most` bytes: alone, with those before it, or on more devices."""
    def fits(changed: TrainConfig, devices: int = found.devices, batch: Mapping[int, int] = buckets) -> bool:
        try:
            made = _plan(changed, batch, found.text, found.chip, devices, found.efficiency)
            return made.fits if most is None else made.largest.memory.total <= most
        except UserError:  # a batch that does not fall into so many parts
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
    if found.devices == 1 and run.lora is None and run.execution.remat == "full" and fits(one_card):
        return f"config.optimizer of {', '.join(f'{name}={value}' for name, value in ONE_CARD.items())} makes it fit"
    for power in range(1, 11):
        factor = 2**power
        wider = dataclasses.replace(together, mesh={"fsdp": -1},
                                    optimizer=dataclasses.replace(together.optimizer, fused=False))
        if fits(wider, found.devices * factor, {tokens: count * factor for tokens, count in buckets.items()}):
            also = f" with {' and '.join(names.values())}" if names else ""
            return f"{found.devices * factor} devices, sharded over fsdp{also}, make it fit"
    return "no setting and no number of these devices makes it fit"


def _changes(run: TrainConfig, found: Plan, buckets: Mapping[int, int]) -> Iterator[tuple[str, Callable]]:
    def optimizer(**fields):
        return lambda run: dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, **fields))

    def execution(**fields):
        return lambda run: dataclasses.replace(run, execution=dataclasses.replace(run.execution, **fields))

    if run.execution.remat == "none":
        yield "config.execution.remat=attention", execution(remat="attention")
    if run.execution.remat != "full":
        yield "config.execution.remat=full", execution(remat="full")
    automatic = dataclasses.replace(run, execution=dataclasses.replace(run.execution, attention="auto"))
    fast = attention_of(automatic, found.largest.image + found.text, found.backend)
    if fast in ("cudnn", "splash") and found.largest.attention != fast:
        yield f"config.execution.attention={fast}", execution(attention=fast)
    rows = math.gcd(*buckets.values()) // (found.mesh["data"] * found.mesh["fsdp"])
    for parts in (2**power for power in range(1, 11)):
        if parts > run.optimizer.accumulate and rows % parts == 0 and not run.optimizer.fused:
            yield f"config.optimizer.accumulate={parts}", optimizer(accumulate=parts)
    if run.lora and run.lora.base not in KINDS:
        yield "config.lora.base=int8", lambda run: dataclasses.replace(
            run, lora=dataclasses.replace(run.lora, base="int8"))
    if found.mesh["fsdp"] < found.devices:
        yield "config.mesh of fsdp alone", lambda run: dataclasses.replace(run, mesh={"fsdp": -1})
    if run.optimizer.ema:
        yield "config.optimizer.ema=0", optimizer(ema=0.0)
