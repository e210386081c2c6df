"""The real training step of a run, compiled from abstract values: what XLA says that it holds and communicates.

For a TPU this is the program that runs there (`acejax.aot`). On virtual CPU devices it is the one that an accelerator
would run, but for what `OPTIONS` and `acejax.train.plan_memory.BACKENDS` tell.
"""

import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from acejax.aot import compiler
from acejax.model.config import MMDiTConfig
from acejax.parallel import mesh as meshes
from acejax.parallel import rules
from acejax.parallel.chips import Topology
from acejax.parallel.options import options
from acejax.train import executables
from acejax.train.config import TrainConfig
from acejax.train.program import Program, place
from acejax.train.stacks import STACKS

# A CPU multiplies bfloat16 matrices in float32, and XLA's loop-invariant code motion then converts what all layers have
# saved ahead of the scan; no other backend has that. Its scheduler starts what can run beside each other, where those
# of a GPU and a TPU keep memory low. (Options by flag: the scheduler, and no effort for the speed of the code.)
OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_backend_optimization_level=0"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step, of one device.

    Attributes:
      arguments: bytes of state and batch.
      temporaries: bytes beside them.
      seconds: that compiling took.
      stack_gathers: shapes of gathers that bring together a whole stack of layers at once.
      repeated_reductions: shapes of parameters whose gradients are reduced oftener than once each.
    """

    arguments: int
    temporaries: int
    seconds: float
    stack_gathers: tuple[str, ...]
    repeated_reductions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kinds:
    """What a step depends on of a run's data, beside the shapes of a batch.

    Attributes:
      references: the most of a sample.
      tasks: how many there are.
      split: `data.canvas.split`: batches have `modify`.
      dtype: the cache's.
    """

    references: int = 1
    tasks: int = 8
    split: bool = True
    dtype: str = "bfloat16"


def abstract_batch(model: MMDiTConfig, samples: int, image: int, text: int, dtype: Any = jnp.bfloat16
                   ) -> dict[str, Any]:
    """A batch of features (`acejax.data.stream.Batch`) as ShapeDtypeStructs; `dtype` is the cache's."""
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((samples, *shape), dtype)

    return {name: array(image, 64) for name in ("edit", "modify", "target")} | {
        "mask": array(image, 256, dtype=jnp.uint8), "unit": array(image, dtype=jnp.int8),
        "positions": array(image, 3, dtype=jnp.int32), "lengths": array(dtype=jnp.int32),
        "text": array(text, model.context_in_dim), "pooled": array(model.vec_in_dim), "task": array(dtype=jnp.int32)}


def compile_step(run: TrainConfig, samples: int, image: int, text: int) -> Compiled:
    """Compile the step of one bucket over all devices that jax has.

    Args:
      run: the run.
      samples: of a batch, over all devices.
      image, text: tokens of a sample.
    """
    program, batch = step_on(run, meshes.make_mesh(run.mesh), samples, image, text)
    started = time.perf_counter()
    lowered = program.step.lower(program.state, batch, frozen=program.frozen)
    compiled = lowered.compile(OPTIONS if jax.default_backend() == "cpu" else None)
    seconds = time.perf_counter() - started
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    params = program.frozen["params"] if program.frozen else program.state.params
    part = samples // run.optimizer.accumulate
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds, stack_gathers(hlo, params),
                    repeated_reductions(hlo, params, {samples, part, image, text, image + text}))


def compile_for(run: TrainConfig, topology: Topology, samples: int, image: int, text: int, schedules: bool = True,
                kinds: Kinds | None = None, save: epath.PathLike | None = None) -> compiler.Report:
    """What the TPU's compiler says of the step of one bucket; arguments as of `compile_step`.

    Args:
      schedules: as of `acejax.aot.compiler.compile`.
      kinds: of the run's data.
      save: a file that gets the compiled step (`acejax.train.executables`).

    Raises:
      UserError: libtpu is not here, or the step does not fit or does not compile, or it can't be saved.
    """
    program, batch = step_on(run, meshes.make_mesh(run.mesh, compiler.devices(topology)), samples, image, text, kinds)
    lowered = program.step.lower(program.state, batch, frozen=program.frozen)
    used = options("tpu", run.execution.compiler_options) or {}
    with executables.afresh() if save else contextlib.nullcontext():
        compiled, report = compiler.compile(lowered, topology, used, schedules)
    if save:
        executables.save(save, program, batch, compiled)
    return report


def step_on(run: TrainConfig, mesh: Mesh, samples: int, image: int, text: int, kinds: Kinds | None = None
            ) -> tuple[Program, Mapping[str, jax.ShapeDtypeStruct]]:
    """The step on a mesh, whose devices need not be here, and a batch of one bucket for it."""
    kinds = kinds or Kinds()
    rules.check_batch(mesh, samples, run.optimizer.accumulate)
    batch = abstract_batch(run.model, samples, image, text, jnp.dtype(kinds.dtype))
    batch = {name: leaf for name, leaf in batch.items() if kinds.split or name != "modify"}
    return (Program.of(run, mesh, kinds.references, kinds.tasks),
            place(batch, dict.fromkeys(batch, rules.batch_sharding(mesh))))


def stack_gathers(hlo: str, params: Any) -> tuple[str, ...]:
    """All-gathers of a compiled step whose result has a whole stack's layers. (Layers go one by one through a scan.)"""
    lengths = {jax.tree.leaves(params[name])[0].shape[0] for name in STACKS}
    return tuple(f"{kind}[{','.join(map(str, shape))}]" for kind, shape in _results(hlo, "all-gather")
                 if len(shape) > 2 and shape[0] in lengths)


def repeated_reductions(hlo: str, params: Any, others: Set[int]) -> tuple[str, ...]:
    """Shapes of the stacks' kernels, without the layers, that more reductions have than there are such kernels.

    A kernel with an axis of a size in `others`, those of a batch, can't be told from activations and is left out.
    """
    kernels, stacked = collections.Counter(), set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if (path := rules.path_of(keys)).endswith("kernel"):
            shape = leaf.shape[1:] if path.startswith(STACKS) else leaf.shape
            kernels[_name(shape)] += 1
            if path.startswith(STACKS) and others.isdisjoint(shape):
                stacked.add(_name(shape))
    gradients = "\n".join(line for line in hlo.splitlines() if "/cond/" not in line)  # the update's own are none: Muon
    found = collections.Counter(_name(shape) for _, shape in _results(gradients, "all-reduce", "reduce-scatter"))
    return tuple(f"[{name}]: {found[name]} for {kernels[name]}" for name in sorted(stacked)
                 if found[name] > kernels[name])


def _name(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, sorted(size for size in shape if size > 1)))  # a gradient may come transposed


def _results(hlo: str, *operations: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each result of these operations, asynchronous or not; combined ones have several."""
    lines = re.findall(rf"= (.*?) (?:{'|'.join(operations)})(?:-start)?\(", hlo)
    return [(kind, tuple(int(size) for size in shape.split(",") if size)) for line in lines
            for kind, shape in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", line)]
