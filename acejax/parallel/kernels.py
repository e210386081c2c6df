"""How a model is computed on the devices that its programs are made for: attention, pins, kernels brought together."""

import dataclasses
import functools
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from acejax.errors import UserError
from acejax.model import attention, remat
from acejax.model.config import Execution, MMDiTConfig
from acejax.parallel import rules
from acejax.parallel.chips import chip_of
from acejax.parallel.processes import is_first


def device_of(mesh: Mesh | None = None) -> jax.Device:
    """One of a mesh's devices, be it of a topology that is not here; without a mesh, where arrays go by default."""
    return next(iter(jax.device_put(0).devices())) if mesh is None else mesh.devices.flat[0]


def platform_of(device: jax.Device) -> str:
    """jax's name of a device's platform, but "rocm" for AMD's GPUs, which jax calls "gpu" and which have no cuDNN."""
    version = str(getattr(device.client, "platform_version", ""))
    return "rocm" if device.platform == "gpu" and "rocm" in version.lower() else device.platform


def on_devices(execution: Execution, config: MMDiTConfig, mesh: Mesh | None = None) -> Execution:
    """An `Execution` for a mesh, or for the device where arrays go by default: its attention, and a mesh's hooks.

    Raises:
      UserError: as `choose` and `check_host`.
    """
    device = device_of(mesh)
    chip = chip_of(device)
    execution = dataclasses.replace(
        execution, chip=chip.name if chip else "",
        attention=choose(execution.attention, device, execution.dtype, config.head_dim))
    check_host(execution.remat, device)
    if mesh is None:
        return execution
    return dataclasses.replace(execution, constrain=rules.constrain(mesh), gather=rules.gather(mesh),
                               share=rules.share(mesh))


def choose(name: str, device: jax.Device, dtype: Any, head_dim: int = 128, where: str = "") -> str:
    """`acejax.model.attention.resolve` for a device, or why it can't be.

    Args:
      name, dtype, head_dim: as there.
      where: what stands before the fields `attention` and `dtype` where a user sets them, for messages.

    Raises:
      UserError: the device has no such attention, or none in this dtype.
    """
    platform = platform_of(device)
    chosen = attention.resolve(name, platform, None, dtype, head_dim)
    if why := attention.lacking(chosen, platform, dtype, head_dim):
        blamed = "dtype" if why.startswith("float16") else "attention"
        value = {"dtype": jax.numpy.dtype(dtype).name, "attention": name}[blamed]
        instead = "" if blamed == "dtype" else f"; expected auto, which takes {_auto(platform, dtype, head_dim)} there"
        raise UserError(f"{where}{blamed} is {value!r}: {why}{instead}")
    return chosen


def check_host(setting: str, device: jax.Device, where: str = "") -> None:
    """Raises UserError where a setting of `acejax.model.remat` keeps something in a memory that the device does not
    have; `where` as of `choose`."""
    if not remat.on_host(setting):
        return
    kinds = [memory.kind for memory in device.addressable_memories()]
    if remat.PINNED not in kinds:
        raise UserError(f"{where}remat is {setting!r}: a {platform_of(device)} can't copy into its host's memory by "
                        f"itself (of the kinds {', '.join(kinds) or 'none'} none is {remat.PINNED}); expected names "
                        f"without {remat.HOST!r}")


def warn_slow(name: str, device: jax.Device, tokens: int, dtype: Any, head_dim: int = 128, where: str = "") -> None:
    """Say in a line, once, that so many tokens go a slow way on an accelerator that has a kernel for them.

    Args:
      name: as the user gave it; the rest as of `choose`.
      tokens: of the longest sequence, text and image.
    """
    platform = platform_of(device)
    kernel = attention.FAST.get(platform)
    chosen = attention.resolve(name, platform, tokens, dtype, head_dim)
    if kernel is None or chosen == kernel or tokens <= attention.LONG:
        return
    why = attention.lacking(kernel, platform, dtype, head_dim)
    if not why:
        cure = f"{where}attention is {name!r}; 'auto' takes {kernel}"
    elif attention.lacking(kernel, platform, head_dim=head_dim):
        cure = why  # no setting helps
    else:
        cure = f"{why}: {where}dtype is {jax.numpy.dtype(dtype).name!r}; with 'bfloat16' " + (
            f"it is {kernel}" if name == "auto" else f"and {where}attention='auto' it is {kernel}")
    _once(f"attention of {tokens:,} tokens goes slowly, by {chosen} on a {platform}: {cure}")


def _auto(platform: str, dtype: Any, head_dim: int) -> str:
    chosen = attention.resolve("auto", platform, None, dtype, head_dim)
    return "xla or xla_chunked" if chosen == "auto" else chosen


@functools.cache
def _once(line: str) -> None:
    if is_first():
        print(f"acejax: {line}", file=sys.stderr, flush=True)
