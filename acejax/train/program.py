"""The training step of a run as a program over its mesh: what training compiles, and what a plan is held against."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from acejax.model.config import Execution
from acejax.parallel import rules
from acejax.train.config import TrainConfig
from acejax.train.fused import fused_step
from acejax.train.optimizer import make_optimizer
from acejax.train.start import load_start
from acejax.train.step import Optimizer, StepConfig, TrainState, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's step and its state, of which nothing is there yet.

    Attributes:
      setting: the step's static part.
      state: ShapeDtypeStructs with their shardings.
      step: the jitted step, (state, batch) -> (state, metrics); the state is donated, metrics lie on every process.
    """

    run: TrainConfig
    mesh: Mesh
    setting: StepConfig
    optimizer: Optimizer
    state: TrainState
    step: Callable[..., Any]

    @classmethod
    def of(cls, run: TrainConfig, mesh: Mesh, references: int, tasks: int) -> "Program":
        """For data of so many references and tasks."""
        how = run.execution
        execution = Execution(how.dtype, how.attention, how.remat, rules.constrain(mesh), rules.share(mesh))
        setting, optimizer = run.setting(execution, references, tasks), make_optimizer(run.optimizer, run.steps)
        shapes = jax.eval_shape(functools.partial(init_state, setting, optimizer))
        placement = rules.shardings(shapes, mesh)
        step = fused_step if run.optimizer.fused else train_step
        step = jax.jit(functools.partial(step, setting=setting, optimizer=optimizer), donate_argnums=0,
                       out_shardings=(placement, placement.step))
        return cls(run, mesh, setting, optimizer, place(shapes, placement), step)

    def begin(self) -> TrainState:
        """The state before the first step, on the mesh: at random, or from the weights that the run starts from."""
        begin = functools.partial(jax.jit, init_state, static_argnums=(0, 1),
                                  out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state))
        if not self.run.init_from:
            return begin()(self.setting, self.optimizer)
        params = load_start(self.run.init_from, self.run.model, self.mesh, self.setting.param_dtype)
        return begin(donate_argnums=2)(self.setting, self.optimizer, params)


def place(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes,
                        shardings)
