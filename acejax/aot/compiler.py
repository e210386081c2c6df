"""Compile a program for TPUs that are not here, and report what the compiler says of it."""

import dataclasses
import importlib.metadata
import importlib.util
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from acejax.aot import hlo, kernels
from acejax.errors import UserError
from acejax.parallel.chips import Chip, Topology

TOP = 10  # operations that are reported
PACKAGES = ("jax", "jaxlib", "libtpu")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a program.

    Attributes:
      calls: how often it runs in a step.
      cycles: of one call, by its final schedule; of one core.
    """

    calls: int
    cycles: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a program, of one device. Nothing of it was measured on one.

    Attributes:
      topology: as acejax names it.
      versions: of jax and libtpu.
      options: the program was compiled with.
      compile_seconds: that it took here.
      peak: bytes of memory at the most, state and batch included.
      limit: bytes that the compiler takes for this chip, or None where that is not known.
      arguments, temporaries: bytes; their sum counts space twice that donated arguments give back.
      cycles: outside kernels, loops times trips.
      kernels: by signature.
      cores: that share a kernel's grid.
      clock: cycles a second.
      collectives: bytes by kind.
      zero_gathers: bytes of all-reduces that stand for a gather.
      top: the costliest operations.
      host: bytes of the host's memory that it uses beside arguments.
    """

    topology: str
    versions: Mapping[str, str]
    options: Mapping[str, str]
    compile_seconds: float
    peak: int
    limit: float | None
    arguments: int
    temporaries: int
    cycles: int
    kernels: Mapping[str, Kernel]
    cores: int
    clock: float | None
    collectives: Mapping[str, float]
    zero_gathers: float
    top: tuple[hlo.Operation, ...]
    host: int = 0

    @property
    def kernel_cycles(self) -> float:
        """Of all calls, by the cores that share them."""
        return sum(kernel.calls * kernel.cycles for kernel in self.kernels.values()) / self.cores

    @property
    def total(self) -> float:
        return self.cycles + self.kernel_cycles

    @property
    def seconds(self) -> float | None:
        """That the cycles take at the chip's clock: the compiler's estimate, without what waits for other devices."""
        return self.total / self.clock if self.clock else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"kernel_cycles": self.kernel_cycles, "total": self.total,
                                           "seconds": self.seconds}


def check(topology: Topology | None = None) -> None:
    """Raises UserError where libtpu is not installed, or the topology is no TPU."""
    if topology is not None and topology.target is None:
        raise UserError(f"topology {topology.name!r}: only TPUs can be compiled for without one, or cpu:N")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu, which is not installed here; `make aot` makes an "
                        "environment with it (.venv-aot, Python 3.12 or newer), or pip install 'acejax[aot]'")


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice, or of several, that need not be there.

    Raises:
      UserError: libtpu is not here, or the topology is no TPU.
    """
    check(topology)
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    cores = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.target, **several, **cores)
    return list(found.devices)


def compile(lowered: jax.stages.Lowered, topology: Topology, options: Mapping[str, str] | None = None,
            schedules: bool = True) -> tuple[jax.stages.Compiled, Report]:
    """Compile a lowered program for a topology.

    Args:
      lowered: of abstract values on `devices(topology)`.
      topology: that they are of.
      options: it was lowered with, for the record.
      schedules: also compile the kernels apart, for their cycles; without, they count 0.

    Raises:
      UserError: the program does not fit, or a kernel does not compile.
    """
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(explain(str(error), topology.chip)) from error
    seconds = time.perf_counter() - started
    return compiled, report(compiled, topology, options or {}, seconds, schedules)


def report(compiled: jax.stages.Compiled, topology: Topology, options: Mapping[str, str], seconds: float = 0.0,
           schedules: bool = True) -> Report:
    """The report of a compiled program; arguments as of `compile`."""
    chip, memory = topology.chip, compiled.memory_analysis()
    program = hlo.read(compiled.as_text())
    cycles = kernels.cycles(program.kernels, topology.target, chip.name) if schedules else {}
    return Report(
        topology=topology.name, versions={name: importlib.metadata.version(name) for name in PACKAGES},
        options=dict(options), compile_seconds=round(seconds, 1), peak=memory.peak_memory_in_bytes, limit=chip.limit,
        arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes, cycles=program.cycles,
        kernels={name: Kernel(calls, cycles.get(name, 0)) for name, calls in program.kernels.items()},
        cores=chip.cores, clock=chip.clock, collectives=program.collectives, zero_gathers=program.zeros,
        top=program.operations[:TOP], host=memory.host_temp_size_in_bytes)


def explain(error: str, chip: Chip | None) -> str:
    """One message of a compiler's error, with what would help."""
    first = error.strip().splitlines()[0][:300]
    if "RESOURCE_EXHAUSTED" in error or "Ran out of memory in memory space hbm" in error:
        limit = "" if chip is None or chip.limit is None else f" of {chip.limit / 2**30:.2f} GiB"
        return (f"the program does not fit into a device's memory{limit} ({first}); what would help: a smaller batch "
                "or more devices over fsdp, config.execution.remat=full, config.optimizer.accumulate, for a LoRA "
                "config.lora.base=int8")
    if "Mosaic" in error or "vmem" in error.lower():
        return (f"a kernel does not compile for this chip ({first}); config.execution.attention=xla_chunked does "
                "without kernels")
    return f"the program does not compile ({first})"
