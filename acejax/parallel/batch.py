"""Batches on the mesh: which rows of a batch a process reads, and how they become global arrays.

A batch falls into as many equal parts as the mesh has places on its batch axes (`rules.batch_parts`), counted in the
order of `rules.BATCH_AXES`, which is not that of the mesh's axes. Processes that differ only along `tensor` or `seq`
hold, and read, the same parts; those of one process need not be neighbours. All a batch's rows are the same on any
mesh.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from acejax.parallel import rules


def parts_of(mesh: Mesh, process: int | None = None) -> tuple[int, ...]:
    """The parts of a batch that the devices of a process hold, in rising order.

    Args:
      process: its index; None is this process.
    """
    process = jax.process_index() if process is None else process
    axes = list(mesh.shape)
    first = [axes.index(axis) for axis in rules.BATCH_AXES if axis in axes]
    places = np.moveaxis(mesh.devices, first, range(len(first))).reshape(rules.batch_parts(mesh), -1)
    return tuple(part for part, devices in enumerate(places)
                 if any(device.process_index == process for device in devices))


def to_mesh(mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays of the rows that this process has read, those of `parts_of` one part after the other."""
    parts, sharding = parts_of(mesh), rules.batch_sharding(mesh)

    def place(values: np.ndarray) -> jax.Array:
        size = len(values) // len(parts)  # rows of a part

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            here = parts.index((index[0].start or 0) // size)
            return values[here * size:(here + 1) * size]

        return jax.make_array_from_callback((size * rules.batch_parts(mesh), *values.shape[1:]), sharding, rows)

    return {name: place(values) for name, values in arrays.items()}
