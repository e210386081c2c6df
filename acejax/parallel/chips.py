"""Accelerators that a run can be planned for, and the names of their slices: `v5e-256`, `h100x8`, `cpu:64`.

Peak rates are the vendors' dense bfloat16 figures. A link is what one device can send to its neighbours, in one
direction, and is the least certain number here:

* TPU: half of the interconnect bandwidth a chip on Google's "TPU system architecture" pages, which add both directions
  (v4 2,400, v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s).
* GPU: what collectives get of NVLink, 370 of H100's 450 GB/s, and the same share of the others' (300, 900); between
  hosts it is whatever the network has, which is less. Cards without NVLink (L40S, RTX 4090): that share of PCIe 4.0's
  32 GB/s.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

from acejax.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as jax counts devices.

    Attributes:
      name: as topologies name it.
      kind: regular expression of the `device_kind` that jax reports.
      hbm: bytes of device memory.
      flops: peak bfloat16 FLOP/s, dense.
      link: bytes/s to its neighbours, one direction.
      cores: how many of a slice's number make one device: TPU v4 and v5p slices are named by TensorCores, two a chip.
      platform: jax's name of the backend, "gpu" or "tpu".
    """

    name: str
    kind: str
    hbm: float
    flops: float
    link: float
    platform: str = "gpu"
    cores: int = 1


CHIPS = {chip.name: chip for chip in (
    Chip("h100", r"NVIDIA H100 80GB HBM3", 80e9, 989e12, 370e9),  # SXM; the PCIe and NVL cards are slower
    Chip("h200", r"NVIDIA H200", 141e9, 989e12, 370e9),
    Chip("a100-80", r"NVIDIA A100-SXM4-80GB", 80e9, 312e12, 245e9),
    Chip("a100-40", r"NVIDIA A100-SXM4-40GB", 40e9, 312e12, 245e9),
    Chip("b200", r"NVIDIA B200", 180e9, 2250e12, 740e9),
    Chip("l40s", r"NVIDIA L40S", 48e9, 362e12, 26e9),
    Chip("rtx4090", r"NVIDIA GeForce RTX 4090", 24e9, 165e12, 26e9),
    Chip("v4", r"TPU v4", 32e9, 275e12, 150e9, "tpu", cores=2),
    Chip("v5e", r"TPU v5 ?(lite|e)", 16e9, 197e12, 100e9, "tpu"),
    Chip("v5p", r"TPU v5p?", 95e9, 459e12, 300e9, "tpu", cores=2),
    Chip("v6e", r"TPU v6 ?(lite|e)", 32e9, 918e12, 224e9, "tpu"),
)}


def chip_of(device: "jax.Device") -> Chip | None:
    """The chip that a device is, by its `device_kind`; None for a CPU or one that is not in the table."""
    return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device.device_kind)), None)


def topology(name: str) -> tuple[Chip | None, int]:
    """A slice's chip, None for `cpu`, and its number of devices.

    `NAMExN` is N chips. `NAME-N` is a slice as Google names them, which for v4 and v5p counts TensorCores: v5p-128 has
    64 chips. `cpu:N` is N virtual devices.

    Raises:
      UserError: a name that is none of these.
    """
    if match := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return None, int(match[1])
    match = re.fullmatch(rf"({'|'.join(map(re.escape, CHIPS))})(?:(x|-)([1-9]\d*))?", name)
    if match is None:
        raise UserError(f"topology {name!r} is unknown; expected a chip and a number (h100x8, v5e-256, v5p-128) or "
                        f"cpu:N; the chips are {', '.join(CHIPS)}")
    chip, count = CHIPS[match[1]], int(match[3] or 1)
    if match[2] != "-":
        return chip, count
    if count % chip.cores:
        raise UserError(f"topology {name!r}: {chip.name} slices are named by TensorCores, {chip.cores} a chip; "
                        "expected an even number")
    return chip, count // chip.cores
