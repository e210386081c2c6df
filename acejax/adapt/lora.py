"""LoRA (arXiv 2106.09685) as a tree beside the parameters: made, trained, joined and merged.

At each adapted module the tree holds a pair of factors and their strength:

    a [layers, in, r], b [layers, r, *features], scale [layers, r, 1 or features[0]] float32

(no layers axis outside the two stacks), and the layer computes x W + (x a) (scale b). `scale` is alpha / rank, one
number per rank and, where a pair serves only some of q, k and v, per slice of the first feature axis: a 0 says "not
there". So files with another A for each of q, k and v, layers of different ranks and several LoRAs at once are all one
pair per module, nothing is folded into the stored numbers, and training keeps what is not there at zero.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.adapt.targets import ACE_PLUS, select, stacked
from acejax.errors import UserError
from acejax.model import mmdit
from acejax.model.config import MMDiTConfig
from acejax.model.dense import scaled
from acejax.model.mmdit import Params

# A single block's qkv and mlp_in are one `linear1` in FLUX: its LoRA has one A for both. proj and mlp_out are one
# `linear2`, joined along the inputs: one B. The left leaf repeats the right one.
SHARED = {"single_blocks/mlp_in/a": "single_blocks/qkv/a", "single_blocks/mlp_out/b": "single_blocks/proj/b"}


def init(config: MMDiTConfig, key: jax.Array, rank: int, alpha: float | None = None,
         targets: str | Sequence[str] = ACE_PLUS, dtype: jnp.dtype = jnp.float32) -> Params:
    """A LoRA that changes nothing yet: a is uniform within 1 / sqrt(in) (PEFT's Kaiming, a = sqrt(5)), b zero.

    Args:
      config: the model.
      key: decides a.
      rank: of every pair.
      alpha: the pairs' scale is alpha / rank; None means rank.
      targets: names of our modules or regular expressions over them (`acejax.adapt.targets`).
      dtype: of a and b.

    Raises:
      UserError: a target that matches nothing, or a rank below 1.
    """
    if rank < 1:
        raise UserError(f"LoRA rank is {rank}; expected at least 1")
    params = jax.eval_shape(lambda: mmdit.init(config, jax.random.key(0)))
    leaves = flatten_dict(params, sep="/")
    kernels = {module: leaves[f"{module}/kernel"].shape for module in select(params, targets)}
    lora, scale = {}, 1.0 if alpha is None else alpha / rank
    for (module, shape), one in zip(kernels.items(), jax.random.split(key, len(kernels)), strict=True):
        layers, (inputs, *features) = (shape[:1], shape[1:]) if stacked(module) else ((), shape)
        bound = 1 / math.sqrt(_fan_in(module, kernels))
        lora |= {f"{module}/a": jax.random.uniform(one, (*layers, inputs, rank), dtype, -bound, bound),
                 f"{module}/b": jnp.zeros((*layers, rank, *features), dtype),
                 f"{module}/scale": jnp.full((*layers, rank, 1), scale, jnp.float32)}
    lora |= {copy: lora[path] for copy, path in SHARED.items() if copy in lora and path in lora}
    return unflatten_dict(lora, sep="/")


def tie(lora: Params) -> tuple[Params, Params]:
    """(factors, scales): what to train, each shared factor once as the reference has it, and what stays fixed.

    `spread` is the way back. Factors that FLUX's joined layers could share but that differ (as in files made for
    diffusers) stay apart. Works under `jax.eval_shape` on what `init` makes.
    """
    leaves = flatten_dict(lora, sep="/")
    factors = {path: leaf for path, leaf in leaves.items()
               if not path.endswith("/scale") and not _same(leaf, leaves.get(SHARED.get(path, "")))}
    scales = {path: leaf for path, leaf in leaves.items() if path.endswith("/scale")}
    return unflatten_dict(factors, sep="/"), unflatten_dict(scales, sep="/")


def spread(factors: Params, scales: Params) -> Params:
    """The tree that `acejax.apply` takes, from what `tie` gives; pure, and a shared factor's gradients add up."""
    leaves = flatten_dict(factors, sep="/")
    leaves |= {copy: leaves[path] for copy, path in SHARED.items()
               if copy not in leaves and copy.rpartition("/")[0] in _modules(leaves)}
    return unflatten_dict(leaves | flatten_dict(scales, sep="/"), sep="/")


@jax.jit
def combine(loras: Sequence[tuple[Params, float]]) -> Params:
    """Several (LoRA, strength) as one: their ranks side by side, strengths in `scale`; exact, in any number."""
    pairs: dict[str, list[dict[str, jax.Array]]] = {}
    for lora, strength in loras:
        leaves = flatten_dict(lora, sep="/")
        for module in _modules(leaves):
            pairs.setdefault(module, []).append({"a": leaves[f"{module}/a"], "b": leaves[f"{module}/b"],
                                                 "scale": leaves[f"{module}/scale"] * strength})
    joined = {}
    for module, parts in pairs.items():
        rank = 1 if stacked(module) else 0
        slices = max(part["scale"].shape[-1] for part in parts)
        scales = [jnp.broadcast_to(part["scale"], (*part["scale"].shape[:-1], slices)) for part in parts]
        joined |= {f"{module}/a": jnp.concatenate([part["a"] for part in parts], axis=-1),
                   f"{module}/b": jnp.concatenate([part["b"] for part in parts], axis=rank),
                   f"{module}/scale": jnp.concatenate(scales, axis=rank)}
    return unflatten_dict(joined, sep="/")


def merge(params: Params, lora: Params) -> Params:
    """`params` with W + a (scale b) for W, in float32 and back to W's dtype; one layer at a time.

    Raises:
      ValueError: a LoRA for a layer that `params` does not have, or has quantised.
    """
    merged, leaves = flatten_dict(params, sep="/"), flatten_dict(lora, sep="/")
    for module in sorted(_modules(leaves)):
        if f"{module}/kernel" not in merged:
            raise ValueError(f"lora has {module!r}, but params has no {module}/kernel (a quantised kernel cannot be "
                             "merged into; dequantize first)")
        args = merged[f"{module}/kernel"], *(leaves[f"{module}/{name}"] for name in ("a", "b", "scale"))
        merged[f"{module}/kernel"] = _merge_layers(*args) if stacked(module) else _merge(*args)
    return unflatten_dict(merged, sep="/")


merge_lora = merge  # the name in acejax's public surface


def _fan_in(module: str, kernels: dict[str, tuple[int, ...]]) -> int:
    """Inputs of the FLUX layer that `module` is part of: parts with one B lie side by side along the inputs."""
    pairs = [{path.removesuffix("/b") for path in pair} for pair in SHARED.items() if pair[0].endswith("/b")]
    parts = next((pair for pair in pairs if module in pair and pair <= kernels.keys()), {module})
    return sum(kernels[part][stacked(part)] for part in parts)


@jax.jit
def _merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    product = jnp.tensordot(a.astype(jnp.float32), scaled(b, scale), axes=1, precision="highest")
    return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)


@jax.jit
def _merge_layers(*args: jax.Array) -> jax.Array:
    return jax.lax.map(lambda layer: _merge(*layer), args)


def _modules(leaves: dict[str, jax.Array]) -> set[str]:
    return {path.rpartition("/")[0] for path in leaves}


def _same(one: jax.Array, other: jax.Array | None) -> bool:
    return one is other or (other is not None and one.dtype == other.dtype and np.array_equal(one, other))
