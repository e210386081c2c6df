"""The device mesh: four named axes, always all of them, so that rules and specs can name any."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from acejax.errors import UserError
from acejax.parallel.chips import TORUS

AXES = ("data", "fsdp", "tensor", "seq")
TYPES = (AxisType.Auto,) * len(AXES)  # always said: jax.make_mesh's default is Explicit, and since 0.12 AbstractMesh's


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None, *,
              slices: int | None = None) -> Mesh:
    """The mesh that acejax's shardings are made for, over all devices or those given.

    It always has four axes, in this order:

    * `data`: copies of the model, each of which sees other samples. The only axis that may lie over a slow network.
    * `fsdp`: samples too; parameters, gradients and optimizer state are split over it, and gathered where needed.
    * `tensor`: attention heads, and the width of the layers.
    * `seq`: a sample's tokens; around attention, tokens are exchanged for heads. tensor x seq must divide the heads.

    All of them are `AxisType.Auto`: between the shardings that are written out, the compiler moves data as it must. A
    mesh by `jax.make_mesh` has Explicit axes unless it is told otherwise, and is refused wherever acejax takes a mesh.

        mesh = acejax.make_mesh({"fsdp": 4, "tensor": 2})    # of eight devices
        mesh = acejax.make_mesh({"data": 2, "fsdp": -1})     # two slices, fsdp within each of them

    Args:
      shape: size of each axis; one may be -1 (what is left), an axis not named is 1. Default: all devices on `data`.
      devices: default: `jax.devices()`. Those of a topology (`jax.experimental.topologies`) will do.
      slices: groups of devices that have a fast network inside and a slow one between them: `data` alone then lies over
        the slow one. Default: what TPUs say of themselves (`slice_index`), one of other devices. Where devices do not
        say it, neighbours in the list make a group.

    Raises:
      UserError: an unknown axis; sizes that do not make up the devices; slices that do not, or that are not what the
        devices say; a `data` that is no multiple of them; devices that jax makes no mesh of.
    """
    devices = list(jax.devices() if devices is None else devices)
    groups = _groups(devices, slices)
    data, *rest = _sizes(shape, len(devices), len(groups))
    within = (data // len(groups), *rest)
    grid = np.concatenate([_grid(within, group) for group in groups])  # one after the other along `data`
    return Mesh(grid, AXES, axis_types=TYPES)


def abstract_mesh(shape: Mapping[str, int], devices: int, slices: int = 1) -> AbstractMesh:
    """As `make_mesh`, over so many devices that need not be there: rules tell shapes by it."""
    return AbstractMesh(_sizes(shape, devices, slices), AXES, axis_types=TYPES)


def in_stages(mesh: Mesh) -> Mesh | None:
    """The same devices with `fsdp` cut into `outer` and `inner`, where it spans a whole torus of three axes.

    There the TPU compiler has no all-gather: it makes one of an all-reduce over a buffer of zeros, of twice the bytes
    (libtpu 0.0.50, v5p and v7x from 64 devices on). Over two axes of the torus and then over the third it has. None
    where one stage does.
    """
    position = mesh.axis_names.index("fsdp") if "fsdp" in mesh.axis_names else None
    if position is None or mesh.shape["fsdp"] < TORUS or not hasattr(mesh, "devices"):
        return None
    line = np.moveaxis(mesh.devices, position, 0).reshape(mesh.shape["fsdp"], -1)[:, 0]
    places = [getattr(device, "coords", ()) for device in line]
    lengths = [len(set(along)) for along in zip(*places, strict=True)]
    if sum(length > 1 for length in lengths) < 3:
        return None
    for axis, outer in enumerate(lengths):  # the one that stays the same for the longest: its parts are neighbours
        inner, rest = divmod(len(line), outer)
        if outer > 1 and rest == 0 and len({place[axis] for place in places[:inner]}) == 1:
            shape, names = list(mesh.devices.shape), list(mesh.axis_names)
            shape[position:position + 1], names[position:position + 1] = [outer, inner], ["outer", "inner"]
            return Mesh(mesh.devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))
    return None


def check(mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError for a mesh whose axes have other names or are not Auto; one that it lacks counts as 1."""
    if unknown := [axis for axis, size in mesh.shape.items() if axis not in AXES and size > 1]:
        raise UserError(f"mesh: unknown axis {', '.join(unknown)} of {dict(mesh.shape)}; the axes are "
                        f"{', '.join(AXES)}: acejax.make_mesh makes such a mesh")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise UserError(f"mesh: the axes of {dict(mesh.shape)} are {', '.join(kind.name for kind in mesh.axis_types)}; "
                        "expected Auto: acejax.make_mesh makes such a mesh, jax.make_mesh one of Explicit axes")


def count_slices(devices: Sequence[Any]) -> int:
    """How many slices devices are of, as `make_mesh` finds it: of TPUs what they say, else one."""
    if any(device.platform != "tpu" for device in devices):
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _groups(devices: Sequence[Any], slices: int | None) -> list[list[Any]]:
    """The devices of each slice; see `make_mesh`."""
    told = [getattr(device, "slice_index", 0) for device in devices]
    found, tpu = sorted(set(told)), any(device.platform == "tpu" for device in devices)
    if slices is None:
        slices = len(found) if tpu else 1  # GPUs tell their hosts apart by it, and fsdp may well lie over hosts
    if len(found) > 1 and (tpu or slices > 1):
        groups = [[device for device, place in zip(devices, told, strict=True) if place == one] for one in found]
    else:
        size = max(1, len(devices) // max(1, slices))
        groups = [list(devices[start:start + size]) for start in range(0, len(devices), size)]
    sizes = [len(group) for group in groups]
    if len(groups) != slices or len(set(sizes)) > 1:
        raise UserError(f"mesh: {slices} equal slices expected; found {len(devices)} devices" + (
            f" of {len(groups)} slices ({', '.join(map(str, sizes))})" if len(found) > 1 else ""))
    return groups


def _grid(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """One slice's devices, so that neighbours on the mesh are neighbours on the network as far as that can be."""
    try:
        try:
            return mesh_utils.create_device_mesh(sizes, devices)
        except NotImplementedError:  # no way to give each axis of the mesh whole axes of the network
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(f"mesh: jax makes none of {len(devices)} devices {devices[0].device_kind!r}: {error}"
                        ) from error


def _sizes(shape: Mapping[str, int] | None, devices: int, slices: int = 1) -> tuple[int, ...]:
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
    if sizes[0] % slices:
        raise UserError(f"mesh: data is {sizes[0]} on {slices} slices; expected a multiple of {slices}, as data alone "
                        "may lie over the slow network between them")
    return tuple(sizes)


def split_cpu(devices: int) -> None:
    """Let the CPU stand for several devices; call it before jax starts.

    A small model runs faster as data-parallel single threads than as one program over all threads. Nothing happens
    where a backend runs already, or XLA_FLAGS says how many there are.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # jax has started
            jax.config.update("jax_num_cpu_devices", devices)
