"""The meshes that tests go through."""

import itertools
import math

from acejax.parallel.mesh import AXES

SWAPPING = {"data": 2, "fsdp": 2, "tensor": 2}  # where XLA swaps rows of batches over (data, fsdp)


def meshes(devices: int) -> list[dict[str, int]]:
    """Every mesh of so many devices."""
    return [dict(zip(AXES, sizes, strict=True)) for sizes in itertools.product(range(1, devices + 1), repeat=len(AXES))
            if math.prod(sizes) == devices]
