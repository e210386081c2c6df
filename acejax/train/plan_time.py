"""Seconds of a step: products, what devices send each other, and how much of that is not hidden behind the products.

A step takes its products and what is exposed of its communication:

    compute   FLOPs with what is recomputed / (devices x peak x efficiency)
    waiting   what sums and moves activations (tensor, seq): products need the result, so all of it is exposed
    moving    weights and gradients (fsdp, data): they travel while another block computes, as long as the products
              last; those of one block have none beside them
    reading   what comes back from the host's memory (`acejax.model.remat`): the TPU compiler's schedule waits for it
              where a block begins (docs/chips.md), so all of it is exposed; on its way there it is hidden. 0 where the
              chip's host link is not known
    exposed   waiting + reading + max(moving / blocks, moving - compute)
    seconds   compute + exposed

Links inside a domain (NVLink, an ICI slice) and the network between domains carry what they carry one after the other.
The efficiency is what one gives, or the chip's (`acejax.parallel.chips`), which is read off the TPU compiler's cycles,
or else assumed. Nothing of this has been measured.
"""

import dataclasses

from jax.sharding import AbstractMesh

from acejax.model import remat
from acejax.parallel.chips import Chip
from acejax.parallel.mesh import AXES, abstract_mesh
from acejax.train.config import TrainConfig
from acejax.train.plan_memory import state_bytes

ASSUMED = 0.5  # share of the peak where nothing is known
GIVEN, COMPILED, GUESSED = "as given", "by the TPU compiler's cycles", "assumed"


def efficiency_of(chip: Chip | None, given: float | None = None) -> tuple[float, str]:
    """Share of the peak that products reach, and where it is from: `GIVEN`, `COMPILED` or `GUESSED`."""
    if given is not None:
        return given, GIVEN
    if chip is None or chip.efficiency is None:
        return ASSUMED, GUESSED
    return chip.efficiency, COMPILED


@dataclasses.dataclass(frozen=True)
class Sending:
    """What one axis of the mesh sends in a step.

    Attributes:
      axis: of the mesh.
      nbytes: that a device would send over an endless axis; over n devices (n - 1) / n of it.
      waits: whether products wait for it.
      shared: whether devices of a domain can each bring a part from outside and share it (gathers and sums), or each
        needs bytes of its own (an exchange of tokens for heads).
    """

    axis: str
    nbytes: float
    waits: bool
    shared: bool = True


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step: products, links inside domains, the network between them, the way back from the host's memory,
    and what of these is not hidden."""

    compute: float
    links: float
    network: float
    reading: float
    exposed: float


def times(run: TrainConfig, mesh: AbstractMesh, samples: int, tokens: int, hardware_flops: float, chip: Chip,
          efficiency: float, domain: int, offloaded: float = 0.0) -> Times:
    """Seconds of a step.

    Args:
      run: the run.
      mesh: of all devices, which fill one domain after the other in the order of its axes.
      samples: of a batch, over all devices.
      tokens: of a sample, text included.
      hardware_flops: of a step, over all devices.
      chip: what the devices are.
      efficiency: share of the peak that products reach.
      domain: devices that links join.
      offloaded: bytes that a device puts into the host's memory, of each part of the batch.
    """
    compute = hardware_flops / (mesh.size * chip.flops * efficiency)
    links = network = waiting = moving = 0.0
    for sending in sendings(run, mesh, samples, tokens):
        inside, outside = split(sending, mesh, domain)
        links += inside / chip.link
        network += outside / chip.network
        if sending.waits:
            waiting += inside / chip.link + outside / chip.network
        else:
            moving += inside / chip.link + outside / chip.network
    blocks = run.model.depth + run.model.depth_single_blocks
    reading = run.optimizer.accumulate * offloaded / chip.host_link if chip.host_link else 0.0
    return Times(compute, links, network, reading, waiting + reading + max(moving / blocks, moving - compute))


def sendings(run: TrainConfig, mesh: AbstractMesh, samples: int, tokens: int) -> list[Sending]:
    """What each axis of the mesh sends in a step, in the activations' dtype, gradients in their own.

    Over fsdp: each part of a batch gathers the weights for its forward and for its backward pass and reduces the
    gradients; what a LoRA is trained on has none. Over data: a gradient is reduced and told, each once. Over tensor: an
    activation is summed (sent twice) twice a block, forward, backward and recomputed. Over seq: q, k, v and the result
    change between tokens and heads.
    """
    size = 2 if run.execution.dtype == "bfloat16" else 4
    kept = 2 if run.optimizer.param_dtype == "bfloat16" else 4
    summed = max(size, 4 if run.execution.reduce_dtype == "float32" else 0) / size  # how much longer a gradient is
    data, fsdp, tensor, seq = (mesh.shape[axis] for axis in AXES)
    frozen, trained, _ = state_bytes(run.model, run.lora, run.optimizer, abstract_mesh({}, 1))
    parameters, frozen = size * trained / kept / tensor, frozen / tensor
    activation = size * samples / (data * fsdp) * tokens / seq * run.model.hidden_size
    blocks, passes = run.model.depth + run.model.depth_single_blocks, 2 if run.execution.remat == remat.NONE else 3
    return [Sending("fsdp", ((2 + summed) * parameters + 2 * frozen) * run.optimizer.accumulate, waits=False),
            Sending("data", 2 * summed * parameters / fsdp, waits=False),
            Sending("tensor", 2 * 2 * passes * blocks * activation, waits=True),
            Sending("seq", 4 * passes * blocks * activation / tensor, waits=True, shared=False)]


def split(sending: Sending, mesh: AbstractMesh, domain: int) -> tuple[float, float]:
    """Bytes that a device sends inside its domain, and out of it.

    Of an axis of n devices, m are in one domain. A gather or a sum goes over the domains first, each of the m devices
    bringing its part of what is outside, and then inside; an exchange goes where it has to.
    """
    count = mesh.shape[sending.axis]
    stride = 1  # devices between two neighbours of this axis
    for axis in AXES[AXES.index(sending.axis) + 1:]:
        stride *= mesh.shape[axis]
    near = min(count, max(1, domain // stride))
    far = 1 - near / count
    if not sending.shared:
        return sending.nbytes * (near - 1) / count, sending.nbytes * far
    return sending.nbytes * (near - 1) / near, sending.nbytes * far / near
