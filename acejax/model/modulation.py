"""What the MMDiT makes of noise level, guidance and pooled text alone: the shifts, scales and gates of its layers.

None of it depends on the picture, so that a sampler knows it for all its steps before the first one. Then 27 % of the
parameters (6.5 GB of FLUX's in bfloat16) are read once instead of at every step, and need not stay on the device.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.model.config import Execution, MMDiTConfig
from acejax.model.dense import Dense
from acejax.model.mmdit import Embedder, Params, check_lora, conditioning

LAYERS = {"double_blocks/img": 6, "double_blocks/txt": 6, "single_blocks": 3, "final_layer": 2}  # vectors of each layer
NAMES = ("modulation", "time_in", "vector_in", "guidance_in")


def split(tree: Params) -> tuple[Params, Params]:
    """(what `modulations` reads, what is left for `apply(..., modulation=)`) of params, a LoRA or quantised kernels."""
    parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for path, leaf in flatten_dict(tree).items():
        parts[set(path).isdisjoint(NAMES)][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def modulations(config: MMDiTConfig, params: Params, sigma: jax.Array, pooled: jax.Array,
                guidance: jax.Array | None = None, *, lora: Params | None = None, quant: Params | None = None,
                execution: Execution = Execution()) -> Params:
    """The modulation of all layers at N noise levels; one of them, with the leading axis gone, is what `apply` takes.

    Args:
      config: the model.
      params: as by `init`; what `split` gives first suffices, here and of the other trees.
      sigma: [N, B] float32 noise levels.
      pooled: [B, vec_in_dim].
      guidance: [B], or None for a model without guidance.
      lora, quant, execution: as of `apply`.

    Returns:
      "double_blocks": {"img", "txt"} [N, depth, B, 6, D], "single_blocks" [N, depth_single_blocks, B, 3, D] and
      "final_layer" [N, B, 2, D], in `execution.dtype`: 2.1 MB a step and sample at FLUX's size.

    Raises:
      ValueError: a `lora` for modulation that the model does not have.
    """
    collections = {"params": params, "lora": lora, "quant": quant}
    if lora is not None:
        check_lora({name: tree for name, tree in collections.items() if name != "lora" and tree}, split(lora)[0])
    vec = vector(config, execution, collections, sigma, pooled, guidance)
    found = {}
    for layer, count in LAYERS.items():
        make = functools.partial(of_layer, config, execution, count, vec=vec)
        leaves = at(collections, f"{layer}/modulation")
        # one layer after the other: so are sharded kernels gathered
        found[layer] = make(leaves) if layer == "final_layer" else jnp.moveaxis(jax.lax.map(make, leaves), 0, 1)
    return unflatten_dict(found, sep="/")


def vector(config: MMDiTConfig, execution: Execution, collections: dict[str, Params | None], sigma: jax.Array,
           pooled: jax.Array, guidance: jax.Array | None) -> jax.Array:
    """What all modulation layers read: [N, B, D], SiLU done. Arguments as of `modulations`."""
    def embed(name: str, x: jax.Array) -> jax.Array:
        return Embedder(config, execution).apply(at(collections, name), x)

    return jax.vmap(lambda level: nn.silu(conditioning(config, embed, level, pooled, guidance)))(sigma)


def of_layer(config: MMDiTConfig, execution: Execution, count: int, leaves: dict[str, Params], vec: jax.Array
             ) -> jax.Array:
    """One layer's vectors [N, B, count, D], from its own leaves by collection."""
    dense = Dense((count, config.hidden_size), execution.dtype)
    return jax.vmap(lambda one: execution.constrain(dense.apply(leaves, one), "modulation"))(vec)


def at(collections: dict[str, Params | None], path: str) -> dict[str, Params]:
    """The part of each collection at a path; without the collections that have none."""
    parts = dict(collections)
    for name in path.split("/"):
        parts = {collection: (tree or {}).get(name) for collection, tree in parts.items()}
    return {collection: part for collection, part in parts.items() if part}
