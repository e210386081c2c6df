"""The training step of a run as a program over its mesh: what training compiles, and what a plan is held against."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from acejax.model import mmdit
from acejax.model.config import Execution
from acejax.parallel import kernels, rules
from acejax.parallel.options import options
from acejax.train import lora
from acejax.train.config import TrainConfig
from acejax.train.fused import fused_step
from acejax.train.optimizer import make_optimizer
from acejax.train.start import load_start
from acejax.train.step import Optimizer, StepConfig, TrainState, init_state, train_step
from acejax.weights import trees


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's step and its state, of which nothing is there yet.

    Attributes:
      setting: the step's static part.
      state: ShapeDtypeStructs with their shardings.
      frozen: likewise what is not trained (`acejax.train.lora`); None where all is.
      step: the jitted step, (state, batch, frozen=) -> (state, metrics); the state is donated, metrics lie on every
        process.
    """

    run: TrainConfig
    mesh: Mesh
    setting: StepConfig
    optimizer: Optimizer
    state: TrainState
    frozen: Any
    step: Callable[..., Any]

    @classmethod
    def of(cls, run: TrainConfig, mesh: Mesh, references: int, tasks: int) -> "Program":
        """For data of so many references and tasks."""
        how = run.execution
        execution = Execution(how.dtype, how.attention, how.remat, reduce_dtype=how.reduce_dtype,
                              int8_products=how.int8_products)
        execution = kernels.on_devices(execution, run.model, mesh)
        setting, optimizer = run.setting(execution, references, tasks), make_optimizer(run.optimizer, run.steps)
        params = frozen = None
        if run.lora:
            params, scales = jax.eval_shape(lambda: lora.factors(run.lora, run.model, run.seed))
            frozen = lora.base_shapes(run.lora, run.model) | {"scales": scales}
            frozen = place(frozen, rules.shardings(frozen, mesh))
        shapes = jax.eval_shape(functools.partial(init_state, setting, optimizer), params)
        placement = rules.shardings(shapes, mesh)
        step = fused_step if run.optimizer.fused else train_step
        step = jax.jit(functools.partial(step, setting=setting, optimizer=optimizer), donate_argnums=0,
                       out_shardings=(placement, placement.step),
                       compiler_options=options(kernels.device_of(mesh).platform, how.compiler_options))
        return cls(run, mesh, setting, optimizer, place(shapes, placement), frozen, step)

    def begin(self) -> TrainState:
        """The state before the first step, on the mesh: at random, or from the weights that the run starts from."""
        begin = functools.partial(jax.jit, init_state, static_argnums=(0, 1),
                                  out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state))
        if self.run.lora:
            params = self._factors(0, self.state.params)
        elif self.run.init_from:
            params = load_start(self.run.init_from, self.run.model, self.mesh, self.setting.param_dtype)
        else:
            return begin()(self.setting, self.optimizer)
        return begin(donate_argnums=2)(self.setting, self.optimizer, params)

    def load_frozen(self) -> Any:
        """What `frozen` describes, on the mesh; a base that is quantised is never there as a whole before."""
        if self.frozen is None:
            return None
        config, model = self.run.lora, self.run.model
        hold, wanted = lora.hold(config, model), trees.flat(self.frozen["params"]) | trees.flat(
            self.frozen.get("quant", {}))

        def each(path: str, leaf: jax.Array) -> dict[str, jax.Array]:
            held = hold(path, leaf)
            return held if path in held else jax.jit(dict, out_shardings={  # as it is, but laid out by the rules
                name: wanted[name].sharding for name in held}, donate_argnums=0)(held)

        if self.run.init_from:
            base = trees.flat(load_start(self.run.init_from, model, self.mesh, lora.held_dtype(config), each))
        else:
            made = _random(model, self.run.seed, lora.held_dtype(config), self.mesh)
            base = {name: one for path, leaf in trees.flat(made).items() for name, one in each(path, leaf).items()}
        return lora.split(base) | {"scales": self._factors(1, self.frozen["scales"])}

    def _factors(self, part: int, like: Any) -> Any:
        """A LoRA's factors (0) or scales (1) before the first step, on the mesh."""
        def make() -> Any:
            return lora.factors(self.run.lora, self.run.model, self.run.seed)[part]

        if not self.run.lora.init_from:
            return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))()
        return jax.tree.map(_spread, jax.device_get(make()), like)  # a file's numbers are no constants of a program


def _random(model: Any, seed: int, dtype: Any, mesh: Mesh) -> Any:
    def make() -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), mmdit.init(model, jax.random.key(seed)))
    return jax.jit(make, out_shardings=rules.shardings(jax.eval_shape(make), mesh))()


def _spread(leaf: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, like.sharding, leaf.__getitem__)


def place(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes,
                        shardings)
