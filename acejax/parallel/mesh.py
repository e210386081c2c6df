"""The device mesh: four named axes, always all of them, so that rules and specs can name any."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from acejax.errors import UserError

AXES = ("data", "fsdp", "tensor", "seq")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, or those given.

    Args:
      shape: size of each axis; one may be -1 (what is left), an axis not named is 1. Default: all devices on `data`.

    Raises:
      UserError: an unknown axis, or sizes that do not make the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(_sizes(shape, len(devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(shape: Mapping[str, int], devices: int) -> AbstractMesh:
    """As `make_mesh`, over so many devices that need not be there: rules tell shapes by it."""
    return AbstractMesh(_sizes(shape, devices), AXES)


def _sizes(shape: Mapping[str, int] | None, devices: int) -> tuple[int, ...]:
    shape = dict(shape or {"data": -1})
    unknown = set(shape) - set(AXES)
    if unknown:
        raise UserError(f"mesh: unknown axis {', '.join(sorted(unknown))}; the axes are {', '.join(AXES)}")
    sizes = [shape.get(axis, 1) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1:
        raise UserError(f"mesh: {shape} has several axes of -1; expected one at most, for what is left")
    if sizes.count(-1) == 1 and fixed > 0 and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) != devices or min(sizes) < 1:
        raise UserError(f"mesh: {shape} does not make up the {devices} devices at hand")
    return tuple(sizes)


def split_cpu(devices: int) -> None:
    """Let the CPU stand for several devices; call it before jax starts.

    A small model runs faster as data-parallel single threads than as one program over all threads. Nothing happens
    where a backend runs already, or XLA_FLAGS says how many there are.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # jax has started
            jax.config.update("jax_num_cpu_devices", devices)
