"""Accelerators that a run can be planned for, and slices of them by name: `h100x8`, `v5e-256x2`, `v7x-64`, `cpu:64`.

Where the figures are from:

* `flops`: the vendors' dense bfloat16 peaks. TPU: "TPU7x (Ironwood)" and the pages of the other chips on
  docs.cloud.google.com (v7x: 2,307 TFLOP/s a chip of two devices). NVIDIA: HGX B200 and B300 2,250, GB200 2,500.
  AMD's data sheets: MI300X and MI325X 1,307.4, MI355X 2,516.6.
* `hbm`: what runtimes say that there is: CUDA's and ROCm's total of a device, as out-of-memory messages of PyTorch
  quote it. It differs by up to 0.3 GiB between drivers; here is the less. Of a TPU: the compiler's limit (v4: that in
  its messages, 30.75 GiB).
* `limit`: what libtpu 0.0.50 names when it refuses a program.
* `clock`: the peak over the FLOPs that the MXUs make in a cycle: v5e 2^17, v5p 2^18 (of two cores), v6e and a device
  of v7x 2^19. For v7x this gives 2.2 GHz, and times of the same attention kernel agree: of equally many cycles, v7x
  takes 0.77 of v6e's time (tokamax's tuning tables, 1.550 and 2.014 ms).
* `efficiency`: FLOPs of the full fine-tune step of 12B, with what is recomputed (305 TFLOP a device), over the peak in
  the seconds of the TPU compiler's cycles (docs/chips.md; tests/train/test_plan_seconds.py): 1.197 G of v6e-8, 1.515 G
  of v5p-128, 2.750 G of v5e-256. The compiler counts no waiting for memory, and no chip has run it.
* `link`, the least certain number: what one device can send to its neighbours in one direction. TPU: half of what the
  first "system architecture" pages called the interconnect of a chip (v4 2,400, v5e 1,600, v5p 4,800, v6e 3,584
  Gbit/s; newer pages count twice as much: "bidirectional", with v7x's chip as v5p's). A torus whose axes all carry a
  collective gets up to twice this. GPU: what collectives get of NVLink, 370 of H100's 450 GB/s, and the same share of
  the others' (A100 300, Blackwell 900), of Infinity Fabric's seven links (MI300X 448, MI355X 538) and, of cards with
  neither, of PCIe 4.0's 32 GB/s.
* `network`: of a GPU, its network card as the vendors' own machines have it (DGX A100 200, HGX H100, H200, B200 and
  GB200 400, B300 800 Gbit/s; AMD's platforms 400); a rented machine may have less. L40S and RTX 4090: an eighth of a
  host's 400 and 25 Gbit/s. Of a TPU: "data center network bandwidth" of a chip on the pages above (v5e 25, v4 and v5p
  50, v6e and v7x 100 Gbit/s).
* `host_link`: what a device can send to its host, or get from it, by the bus: half of what data sheets call the
  bandwidth of PCIe, which counts both directions (Gen 4 x16 64 GB/s: A100, L40S, RTX 4090; Gen 5 x16 128 GB/s: H100,
  H200, B200, MI300X, MI325X, MI355X). TPU v4: 16 GB/s each way ("How to Scale Your Model", chapter "How to Think About
  TPUs"). None where nothing is published, or it is another kind of link (GB200, B300, newer TPUs).
* `host`: a machine's devices and memory, as the clouds' most common types have them.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import TYPE_CHECKING

from acejax.errors import UserError

TORUS = 64  # devices from which on three axes of a TPU's network are a torus

if TYPE_CHECKING:
    import jax

GIB = 2**30
GBIT = 1e9 / 8
ALIASES = {"tpu7x": "v7x", "v5litepod": "v5e"}  # what Google's commands call them
LIBTPU = {"v7x": "tpu7x"}  # where libtpu has another name than we
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # all slices of v5e and v6e
BELOW_A_CUBE = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of the others; v4 has none of one chip
CUBE, LONGEST = 4, 24  # chips of an axis: beyond those, slices are cubes of 4 x 4 x 4, of this length at most


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as jax counts devices; all figures are of a device.

    Attributes:
      name: as topologies name it.
      kind: regular expression of the `device_kind` that jax reports.
      hbm: bytes of device memory.
      flops: peak bfloat16 FLOP/s, dense.
      link: bytes/s to its neighbours inside a domain, one direction.
      network: bytes/s between domains, one direction.
      domain: devices that links join: of an NVLink or Infinity Fabric domain, or of the largest ICI slice.
      platform: "gpu" (CUDA), "rocm" or "tpu", as `acejax.model.attention.resolve` takes it.
      cores: how many of a slice's number make one device: v4 and v5p slices are named by TensorCores, of which two
        make one device (megacore). (v7x slices are too, but there each TensorCore is a device.)
      devices: jax devices of a chip.
      torus: axes of a slice's torus, 0 where there is none.
      clock: Hz of the cycles that the TPU compiler counts; None for GPUs.
      efficiency: share of the peak that products reach by the TPU compiler's cycles; None where none were counted.
      limit: bytes that the TPU compiler takes for a program; None where it is not known.
      host_link: bytes/s to the host's memory, one direction; None where it is not known.
      host: devices and bytes of memory of one machine.
    """

    name: str
    kind: str
    hbm: float
    flops: float
    link: float
    network: float
    domain: int
    platform: str = "gpu"
    cores: int = 1
    devices: int = 1
    torus: int = 0
    clock: float | None = None
    efficiency: float | None = None
    limit: float | None = None
    host_link: float | None = None
    host: tuple[int, float] = (8, 2000e9)


def _tpu(name: str, kind: str, gib: float, flops: float, link: float, network: float, domain: int, torus: int,
         host: tuple[int, float], clock: float | None = None, efficiency: float | None = None, **more: float) -> Chip:
    limit = None if clock is None else gib * GIB
    return Chip(name, kind, gib * GIB, flops, link, network * GBIT, domain, "tpu", torus=torus, host=host, clock=clock,
                efficiency=efficiency, limit=limit, **more)


CHIPS = {chip.name: chip for chip in (
    Chip("h100", r"NVIDIA H100 80GB HBM3", 79.1 * GIB, 989e12, 370e9, 400 * GBIT, 8,
         host_link=64e9),  # SXM; PCIe and NVL are slower
    Chip("h200", r"NVIDIA H200", 139.7 * GIB, 989e12, 370e9, 400 * GBIT, 8, host_link=64e9),
    Chip("a100-80", r"NVIDIA A100-SXM4-80GB", 79.15 * GIB, 312e12, 245e9, 200 * GBIT, 8, host_link=32e9),
    Chip("a100-40", r"NVIDIA A100-SXM4-40GB", 39.4 * GIB, 312e12, 245e9, 200 * GBIT, 8, host=(8, 1000e9),
         host_link=32e9),
    Chip("b200", r"NVIDIA B200", 178.35 * GIB, 2250e12, 740e9, 400 * GBIT, 8, host_link=64e9),
    Chip("gb200", r"NVIDIA GB200", 184.3 * GIB, 2500e12, 740e9, 400 * GBIT, 72, host=(4, 900e9)),
    Chip("b300", r"NVIDIA B300( SXM6 AC)?", 267.7 * GIB, 2250e12, 740e9, 800 * GBIT, 8),
    Chip("mi300x", r"AMD Instinct MI300X( VF)?", 191.7 * GIB, 1307.4e12, 368e9, 400 * GBIT, 8, platform="rocm",
         host_link=64e9),
    Chip("mi325x", r"AMD Instinct MI325X( VF)?", 255.7 * GIB, 1307.4e12, 368e9, 400 * GBIT, 8, platform="rocm",
         host_link=64e9),
    Chip("mi355x", r"AMD Instinct MI355X( VF)?", 287.7 * GIB, 2516.6e12, 442e9, 400 * GBIT, 8, platform="rocm",
         host_link=64e9),
    Chip("l40s", r"NVIDIA L40S", 44.4 * GIB, 362e12, 26e9, 50 * GBIT, 8, host=(8, 1000e9), host_link=32e9),
    Chip("rtx4090", r"NVIDIA GeForce RTX 4090", 23.6 * GIB, 165e12, 26e9, 3.1 * GBIT, 8, host=(8, 500e9),
         host_link=32e9),
    _tpu("v4", r"TPU v4", 30.75, 275e12, 150e9, 50, 4096, 3, (4, 400e9), cores=2, host_link=16e9),
    _tpu("v5e", r"TPU v5 ?(lite|e)", 15.75, 197e12, 100e9, 25, 256, 2, (4, 190e9), 1.5e9, 0.84),
    _tpu("v5p", r"TPU v5p?", 95.73, 459e12, 300e9, 50, 6144, 3, (4, 448e9), 1.75e9, 0.77, cores=2),
    _tpu("v6e", r"TPU v6 ?(lite|e)", 31.24, 918e12, 224e9, 100, 256, 2, (4, 720e9), 1.75e9, 0.49),
    _tpu("v7x", r"TPU7x", 94.74, 1153.5e12, 150e9, 50, 18432, 3, (8, 960e9), 2.2e9, devices=2),
)}


def chip_of(device: "jax.Device") -> Chip | None:
    """The chip that a device is, by its `device_kind`; None for a CPU or one that is not in the table."""
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device.device_kind)), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices by name.

    Attributes:
      name: as it was given.
      chip: None for `cpu`.
      devices: as jax counts them, of all slices.
      slices: of a TPU; what joins them is slow. GPUs are one, however many machines they are in (`domains`).
    """

    name: str
    chip: Chip | None
    devices: int
    slices: int = 1

    @property
    def chips(self) -> int:
        """What is rented and paid for."""
        return self.devices if self.chip is None else self.devices // self.chip.devices

    @property
    def shape(self) -> str | None:
        """Chips along the axes of one slice, "2x4" or "4x4x4"; None for what is no TPU."""
        if self.chip is None or not self.chip.torus:
            return None
        return "x".join(map(str, _shapes(self.chip)[self.chips // self.slices]))

    @property
    def copies(self) -> int:
        """What the mesh's `data` should be: the slices, times one side of a torus of three axes.

        Then `fsdp` spans two axes, over which a TPU reduces and scatters gradients; over three its compiler all-reduces
        them, of twice the bytes (`acejax.parallel.mesh.in_stages`).
        """
        sides = self.shape.split("x") if self.shape else ()
        whole = len(sides) == 3 and self.devices // self.slices >= TORUS
        return self.slices * (int(sides[0]) if whole else 1)

    @property
    def target(self) -> str | None:
        """One slice as `jax.experimental.topologies.get_topology_desc` takes it, "v6e:2x4", "tpu7x:2x4x4".

        Of v4 libtpu then makes a device of each TensorCore, eight for 2x2x1, where a job has one of each chip.
        """
        return self.shape and f"{LIBTPU.get(self.chip.name, self.chip.name)}:{self.shape}"


def topology(name: str) -> Topology:
    """Devices by their name.

    `NAMExN` is N chips. `NAME-N` is a slice as Google names them, which counts TensorCores for v4, v5p and v7x, of two
    a chip: v5p-128 has 64 chips, which are 64 devices; v7x-64 has 32 chips, which are 64 devices (`tpu7x-8` is one host
    of four chips in gcloud and xpk, and in MaxText `tpu7x-128` is 4x4x4 chips). `NAME-NxS` is S such slices: v5e-256x2.
    `cpu:N` is N virtual devices.

    Raises:
      UserError: a name that is none of these, or a slice that does not exist.
    """
    if match := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Topology(name, None, int(match[1]))
    known = "|".join(map(re.escape, (*CHIPS, *ALIASES)))
    match = re.fullmatch(rf"({known})(?:x([1-9]\d*)|-([1-9]\d*)(?:x([1-9]\d*))?)?", name)
    if match is None:
        raise UserError(f"topology {name!r} is unknown; expected a chip and a number (h100x8, v5e-256, v5p-128, two "
                        f"slices: v5e-256x2) or cpu:N; the chips are {', '.join(CHIPS)}")
    chip = CHIPS[ALIASES.get(match[1], match[1])]
    slices = int(match[4] or 1)
    chips = int(match[2] or 1) if match[3] is None else int(match[3]) / (chip.cores * chip.devices)
    if not chip.torus:
        if slices > 1:
            raise UserError(f"topology {name!r}: only TPUs come in slices; expected {match[1]}x{int(chips) * slices}")
        return Topology(name, chip, int(chips))
    if chips not in _shapes(chip):
        raise UserError(f"topology {name!r}: there is no such slice; {_nearest(chip, chips)}")
    return Topology(name, chip, int(chips) * chip.devices * slices, slices)


def slice_sizes(chip: Chip) -> list[int]:
    """Devices of all slices that there are of a TPU, the smallest first."""
    return [count * chip.devices for count in _shapes(chip)]


@functools.cache
def _shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
    """Slices of a TPU, chips along each axis by the number of chips, the smallest first. Of several shapes with one
    number, the one that is most of a cube."""
    if chip.torus == 2:
        return {math.prod(shape): shape for shape in FLAT}
    small = BELOW_A_CUBE[1:] if chip.name == "v4" else BELOW_A_CUBE
    most = chip.domain // chip.devices
    sides = range(CUBE, LONGEST + 1, CUBE)
    cubes = [shape for shape in itertools.combinations_with_replacement(sides, 3) if math.prod(shape) <= most]
    cubes.sort(key=lambda shape: (math.prod(shape), -sum(shape)))
    return {math.prod(shape): shape for shape in (*small, *cubes)}


def _nearest(chip: Chip, chips: float) -> str:
    """The slices next to a number of chips, by name."""
    sizes = list(_shapes(chip))
    near = [*[size for size in sizes if size < chips][-1:], *[size for size in sizes if size > chips][:1]]
    per_chip = chip.cores * chip.devices
    names = " and ".join(f"{chip.name}-{size * per_chip} ({'x'.join(map(str, _shapes(chip)[size]))} chips)"
                         for size in near)
    counted = ", named by TensorCores, two a chip," if per_chip > 1 else ""
    return f"the nearest{counted} {'are' if len(near) > 1 else 'is'} {names}"
