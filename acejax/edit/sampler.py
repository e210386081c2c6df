"""From noise to latents: the modulation of all steps first, then Euler as one compiled loop without its weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from acejax import flow, lcu
from acejax.edit import step_cache
from acejax.errors import UserError
from acejax.model import mmdit, modulation
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.dense import parts_first
from acejax.model.mmdit import Params, Tokens
from acejax.parallel import kernels, rules

Trees = dict[str, Params | None]  # params, lora, quant
INPUTS = {64: (), 384: ("edit", "mask"), 448: ("edit", "modify", "mask")}  # of the features, by img_in's channels


class Sampler:
    """Makes latents with one base model; a LoRA is an argument, so that another one needs nothing to be read again.

    Programs are compiled once for each shape: batch, canvas, steps, text, and the ranks of a LoRA.

    Args:
      config: the model; 64 channels (text to picture), 384 or 448.
      params: its parameters, on devices or on the host. With `offload`, hand over the only reference.
      quant: kernels in eight bits (`acejax.adapt.quantize`), which `params` then lacks.
      execution: how it is computed; on a mesh, its pins are the mesh's. Attention "auto" is the fast kernel of the
        devices that there are (`acejax.model.attention.resolve`).
      mesh: parameters are sharded by `acejax.parallel.rules`, samples fall over `fsdp` and `data`; None is one device.
      offload: keep the 27 % of the parameters that make modulation on the host, and send them through the device layer
        by layer, once an edit.

    Raises:
      UserError: heads that do not fall apart over the mesh, or attention that the devices do not have.
      ValueError: channels that are no variant's.
    """

    def __init__(self, config: MMDiTConfig, params: Params, *, quant: Params | None = None,
                 execution: Execution = Execution(), mesh: Mesh | None = None, offload: bool = False):
        if config.in_channels not in INPUTS:
            raise ValueError(f"the model reads {config.in_channels} channels; known: {', '.join(map(str, INPUTS))}")
        if mesh is not None:
            rules.check_heads(mesh, config.num_heads)
        self._asked, self._device = execution.attention, kernels.device_of(mesh)
        execution = kernels.on_devices(execution, config, mesh)
        self.config, self.execution, self.mesh, self.offload = config, execution, mesh, offload
        first, rest = split({"params": params, "quant": quant})
        self._first, rest = jax.device_get(first) if offload else self.place(first), self.place(rest)
        if self._device.platform == "tpu":
            rest = {name: tree and parts_first(tree) for name, tree in rest.items()}
        self._rest = self.place(rest)

    def place(self, tree: Any) -> Any:
        """Parameters, or a LoRA that will be used often, where the sampler wants them; nothing moves that is there."""
        return jax.device_put(tree, None if self.mesh is None else rules.shardings(tree, self.mesh))

    def __call__(self, features: Mapping[str, np.ndarray], noise: np.ndarray, steps: int,
                 guidance: float | Sequence[float] | None = 1.0, lora: Params | None = None, *,
                 cache: float | None = None, say: Callable[[int, int], None] | None = None) -> jax.Array:
        """Latents [B, h, w, 16] of whole canvases, float32.

        Args:
          features: `edit`, `modify`, `mask` as by `acejax.data.latents.encode`, as far as the model reads them, `text`
            [B, T, D] and `pooled` [B, P].
          noise: [B, h, w, 16], the canvases at noise level 1.
          steps: of Euler.
          guidance: of each sample, or of all; a model without guidance reads none.
          lora: `acejax.adapt.lora`; several are one by its `combine`.
          cache: leave the blocks out of steps whose modulation has changed by no more than this since they last ran
            (`acejax.edit.step_cache`). None: all steps are whole.
          say: is told how many steps are done, and how many of them were whole, each time the blocks have run. The
            program is the one that takes all steps at once: only the host waits in between.

        Raises:
          UserError: no steps, or tokens that do not fall apart over the mesh.
          ValueError: features or guidance that are absent, or a LoRA for layers that the model does not have.
        """
        if steps < 1:
            raise UserError(f"steps is {steps}; expected at least 1")
        absent = [name for name in (*INPUTS[self.config.in_channels], "text", "pooled") if features.get(name) is None]
        if absent:
            raise ValueError(f"features lack {', '.join(absent)}, which a model of {self.config.in_channels} channels "
                             "reads")
        if guidance is None and self.config.guidance_embed:
            raise ValueError("guidance is None, but the model reads guidance")
        batch, height, width, _ = noise.shape
        size = height * width // lcu.PATCH**2
        if self.mesh is not None:
            rules.check_tokens(self.mesh, f"a canvas of {8 * width} x {8 * height} pixels", size)
            rules.check_tokens(self.mesh, "the text", features["text"].shape[1])
        kernels.warn_slow(self._asked, self._device, size + features["text"].shape[1], self.execution.dtype,
                          self.config.head_dim)
        names = (*INPUTS[self.config.in_channels], "text", "pooled")
        scale = np.broadcast_to(np.asarray(0.0 if guidance is None else guidance, np.float32), batch)
        rows = self._spread({name: features[name] for name in names} | {"noise": noise, "guidance": scale})
        sigmas = flow.schedule(steps, size)
        first, rest = split({"lora": None if lora is None else self.place(lora)})
        made = self._modulations(self._first | first, sigmas[:-1], rows.pop("pooled"), rows.pop("guidance"))
        full = None if cache is None else _full_steps(made, cache)
        starts = [0] if say is None else range(steps) if full is None else np.flatnonzero(full)
        for whole, span in enumerate(zip(starts, [*starts[1:], steps], strict=True), 1):
            latents = _loop(self.config, self.execution, full, self._rest | rest, rows, sigmas, made, np.int32(span))
            rows["noise"] = jax.device_put(latents, None if self.mesh is None else rules.batch_sharding(self.mesh))
            if say is not None:
                latents.block_until_ready()
                say(int(span[1]), whole)
        return latents[:batch]

    def _modulations(self, trees: Trees, levels: jax.Array, pooled: jax.Array, guidance: jax.Array) -> Params:
        """Of all layers at levels [N]. Offloaded, the device has one layer's kernel at a time."""
        levels = jnp.broadcast_to(levels[:, None], (len(levels), len(pooled)))
        if not self.offload:
            return _modulations(self.config, self.execution, trees, levels, pooled, guidance)
        embedders = {kind: {name: part for name, part in (tree or {}).items() if name.endswith("_in")} or None
                     for kind, tree in trees.items()}
        vec = _vector(self.config, self.execution, self.place(embedders), levels, pooled, guidance)

        def layer(count: int, leaves: dict[str, Params]) -> jax.Array:
            placed = {kind: self.place({"modulation": part})["modulation"] for kind, part in leaves.items()}
            made = _of_layer(self.config, self.execution, count, placed, vec)
            return made.block_until_ready()  # else the next kernels are sent while this one waits

        found = {}
        for name, count in modulation.LAYERS.items():
            leaves = modulation.at(trees, f"{name}/modulation")
            if name == "final_layer":
                found[name] = layer(count, leaves)
            else:
                depth = len(jax.tree.leaves(leaves)[0])
                found[name] = jnp.stack([layer(count, jax.tree.map(lambda leaf, i=i: leaf[i], leaves))
                                         for i in range(depth)], 1)
        return unflatten_dict(found, sep="/")

    def _spread(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Rows over the mesh; the last one is repeated until they divide."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, rows)
        short = -len(rows["noise"]) % rules.batch_parts(self.mesh)
        rows = {name: np.concatenate([row, np.repeat(row[-1:], short, 0)]) if short else row
                for name, row in rows.items()}
        return jax.device_put(rows, rules.batch_sharding(self.mesh))


def split(trees: Trees) -> tuple[Trees, Trees]:
    """(what the modulation is made of, what the loop reads) of params, lora and quant."""
    parts = {name: (None, None) if tree is None else modulation.split(tree) for name, tree in trees.items()}
    return tuple({name: part[i] or None for name, part in parts.items()} for i in (0, 1))


def sample(config: MMDiTConfig, execution: Execution, full: jax.Array | None, trees: Trees,
           features: Mapping[str, jax.Array], sigmas: jax.Array, made: Params, span: jax.Array | None = None
           ) -> jax.Array:
    """The loop as a pure function: latents [B, h, w, 16] at sigmas[-1], or at the end of a span.

    Args:
      full: [N] bool, the steps that run the blocks (`acejax.edit.step_cache.full_steps`); None: all.
      trees: what `split` gives second, all three.
      features: as the sampler's, with `noise`, and without `pooled`.
      sigmas: [N + 1].
      made: the modulation of the first N of them (`acejax.model.modulation.modulations`).
      span: [2] int32, as of `acejax.flow.euler`; `noise` holds the latents at its start, and with `full` it starts with
        a step that runs the blocks.
    """
    batch, height, width, _ = features["noise"].shape
    parts = {name: lcu.patchify(lcu.fold_mask(features[name]) if name == "mask" else features[name])
             for name in INPUTS[config.in_channels]}
    grid = lcu.positions(height, width)
    grid = jnp.broadcast_to(grid, (batch, *grid.shape))
    pooled = jnp.zeros((batch, config.vec_in_dim))  # the modulation knows it, and the noise level

    def forward(latents, sigma, one, residual=None):
        tokens = Tokens(lcu.channels(latents, **parts), grid, features["text"], pooled, jnp.full(batch, sigma))
        velocity, residual = mmdit.forward(config, tokens=tokens, modulation=one, residual=residual,
                                           execution=execution, **trees)
        return execution.constrain(velocity, "hidden"), residual

    noise = execution.constrain(lcu.patchify(features["noise"]).astype(jnp.float32), "hidden")
    span = None if span is None else (span[0], span[1])
    if full is None:
        latents = flow.euler(lambda *arguments: forward(*arguments)[0], noise, sigmas, made, span=span)
    else:
        residual = jax.ShapeDtypeStruct((*noise.shape[:2], config.hidden_size), execution.dtype)
        latents = step_cache.euler(forward, noise, sigmas, made, residual, full, span)
    return lcu.unpack(latents, height, width)


def _modulate(config, execution, trees, sigma, pooled, guidance):
    return modulation.modulations(config, sigma=sigma, pooled=pooled, guidance=guidance, execution=execution, **trees)


_loop = jax.jit(sample, static_argnums=(0, 1))
_full_steps = jax.jit(step_cache.full_steps)
_modulations = jax.jit(_modulate, static_argnums=(0, 1))
_vector = jax.jit(modulation.vector, static_argnums=(0, 1))
_of_layer = jax.jit(modulation.of_layer, static_argnums=(0, 1, 2))
