"""Which foreign tensor holds which part of our tree: one table per layout, read in both directions.

A table row names a foreign module ("{i}" is the layer), the modules of ours it is made of, and the axis they are
joined along. A trailing `[k]` takes one slice of our module's first feature axis: q, k or v of `qkv`; shift, scale or
gate of a modulation. `plan` expands a table to copies of blocks, which is all that import and export need.

Names: black-forest-labs/flux `model.py` and `modules/layers.py` (ACE_plus `modules/flux.py` keeps them); diffusers
`models/transformers/transformer_flux.py`. A torch linear weight is [out, in]; our kernel is [in, *features].
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.model import mmdit
from acejax.model.config import MMDiTConfig

Shape = tuple[int, ...]
OUT, IN = 0, 1  # axes of a torch linear weight


@dataclasses.dataclass(frozen=True)
class Joined:
    """Our modules, in order along one axis of the foreign weight; a foreign bias joins the biases there are."""

    modules: tuple[str, ...]
    axis: int = OUT


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store a model: names of a module's tensors, and foreign module -> our modules."""

    leaves: Mapping[str, str]
    modules: Mapping[str, str | Joined]

    def key(self, path: str) -> str:
        """The foreign key that stores our leaf `path` ("img_in/kernel") whole and alone."""
        module, leaf = path.rsplit("/", 1)
        return next(f"{name}.{self.leaves[leaf]}" for name, ours in self.modules.items() if ours == module)


BFL = Layout({"kernel": "weight", "bias": "bias", "scale": "scale"}, {
    "img_in": "img_in",
    "txt_in": "txt_in",
    "time_in.in_layer": "time_in/in_layer",
    "time_in.out_layer": "time_in/out_layer",
    "vector_in.in_layer": "vector_in/in_layer",
    "vector_in.out_layer": "vector_in/out_layer",
    "guidance_in.in_layer": "guidance_in/in_layer",
    "guidance_in.out_layer": "guidance_in/out_layer",
    "double_blocks.{i}.img_mod.lin": "double_blocks/img/modulation",
    "double_blocks.{i}.img_attn.qkv": "double_blocks/img/qkv",
    "double_blocks.{i}.img_attn.norm.query_norm": "double_blocks/img/query_norm",
    "double_blocks.{i}.img_attn.norm.key_norm": "double_blocks/img/key_norm",
    "double_blocks.{i}.img_attn.proj": "double_blocks/img/proj",
    "double_blocks.{i}.img_mlp.0": "double_blocks/img/mlp_in",
    "double_blocks.{i}.img_mlp.2": "double_blocks/img/mlp_out",
    "double_blocks.{i}.txt_mod.lin": "double_blocks/txt/modulation",
    "double_blocks.{i}.txt_attn.qkv": "double_blocks/txt/qkv",
    "double_blocks.{i}.txt_attn.norm.query_norm": "double_blocks/txt/query_norm",
    "double_blocks.{i}.txt_attn.norm.key_norm": "double_blocks/txt/key_norm",
    "double_blocks.{i}.txt_attn.proj": "double_blocks/txt/proj",
    "double_blocks.{i}.txt_mlp.0": "double_blocks/txt/mlp_in",
    "double_blocks.{i}.txt_mlp.2": "double_blocks/txt/mlp_out",
    "single_blocks.{i}.modulation.lin": "single_blocks/modulation",
    "single_blocks.{i}.linear1": Joined(("single_blocks/qkv", "single_blocks/mlp_in"), OUT),
    "single_blocks.{i}.linear2": Joined(("single_blocks/proj", "single_blocks/mlp_out"), IN),
    "single_blocks.{i}.norm.query_norm": "single_blocks/query_norm",
    "single_blocks.{i}.norm.key_norm": "single_blocks/key_norm",
    "final_layer.adaLN_modulation.1": "final_layer/modulation",
    "final_layer.linear": "final_layer/linear",
})

DIFFUSERS = Layout({"kernel": "weight", "bias": "bias", "scale": "weight"}, {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in/in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in/out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in/in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in/out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in/in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in/out_layer",
    "transformer_blocks.{i}.norm1.linear": "double_blocks/img/modulation",
    "transformer_blocks.{i}.attn.to_q": "double_blocks/img/qkv[0]",
    "transformer_blocks.{i}.attn.to_k": "double_blocks/img/qkv[1]",
    "transformer_blocks.{i}.attn.to_v": "double_blocks/img/qkv[2]",
    "transformer_blocks.{i}.attn.norm_q": "double_blocks/img/query_norm",
    "transformer_blocks.{i}.attn.norm_k": "double_blocks/img/key_norm",
    "transformer_blocks.{i}.attn.to_out.0": "double_blocks/img/proj",
    "transformer_blocks.{i}.ff.net.0.proj": "double_blocks/img/mlp_in",
    "transformer_blocks.{i}.ff.net.2": "double_blocks/img/mlp_out",
    "transformer_blocks.{i}.norm1_context.linear": "double_blocks/txt/modulation",
    "transformer_blocks.{i}.attn.add_q_proj": "double_blocks/txt/qkv[0]",
    "transformer_blocks.{i}.attn.add_k_proj": "double_blocks/txt/qkv[1]",
    "transformer_blocks.{i}.attn.add_v_proj": "double_blocks/txt/qkv[2]",
    "transformer_blocks.{i}.attn.norm_added_q": "double_blocks/txt/query_norm",
    "transformer_blocks.{i}.attn.norm_added_k": "double_blocks/txt/key_norm",
    "transformer_blocks.{i}.attn.to_add_out": "double_blocks/txt/proj",
    "transformer_blocks.{i}.ff_context.net.0.proj": "double_blocks/txt/mlp_in",
    "transformer_blocks.{i}.ff_context.net.2": "double_blocks/txt/mlp_out",
    "single_transformer_blocks.{i}.norm.linear": "single_blocks/modulation",
    "single_transformer_blocks.{i}.attn.to_q": "single_blocks/qkv[0]",
    "single_transformer_blocks.{i}.attn.to_k": "single_blocks/qkv[1]",
    "single_transformer_blocks.{i}.attn.to_v": "single_blocks/qkv[2]",
    "single_transformer_blocks.{i}.attn.norm_q": "single_blocks/query_norm",
    "single_transformer_blocks.{i}.attn.norm_k": "single_blocks/key_norm",
    "single_transformer_blocks.{i}.proj_mlp": "single_blocks/mlp_in",
    "single_transformer_blocks.{i}.proj_out": Joined(("single_blocks/proj", "single_blocks/mlp_out"), IN),
    # AdaLayerNormContinuous reads (scale, shift), FLUX's own final layer (shift, scale)
    "norm_out.linear": Joined(("final_layer/modulation[1]", "final_layer/modulation[0]"), OUT),
    "proj_out": "final_layer/linear",
})

LAYOUTS = {"bfl": BFL, "diffusers": DIFFUSERS}


@dataclasses.dataclass(frozen=True)
class Copy:
    """Foreign `key[region]` and our `path[index]` hold the same numbers, ours in the shape `block`."""

    key: str
    region: tuple[slice, ...]
    path: str
    index: tuple[int | slice, ...]
    block: Shape

    def to_torch(self, leaf: Any) -> np.ndarray:
        """Our leaf -> the region's numbers, [out, in] or [out]; a view where numpy can."""
        block = np.asarray(leaf)[self.index]
        return block.reshape(block.shape[0], -1).T if len(self.region) == 2 else block.reshape(-1)

    def from_torch(self, region: np.ndarray) -> np.ndarray:
        """The inverse: the region's numbers -> our block."""
        return region.T.reshape(self.block)


def plan(layout: Layout, shapes: Mapping[str, Shape]) -> tuple[Copy, ...]:
    """Expand a table over a model's leaves (`shapes`: our path -> shape); rows of absent modules fall away."""
    copies = []
    for module, ours in layout.modules.items():
        joined = ours if isinstance(ours, Joined) else Joined((ours,))
        for leaf, name in layout.leaves.items():
            parts = [(f"{part}/{leaf}", k) for part, k in map(_split, joined.modules) if f"{part}/{leaf}" in shapes]
            if not parts:
                continue
            stacked = "{i}" in module
            for i in range(shapes[parts[0][0]][0]) if stacked else [None]:
                key, start = f"{module.format(i=i)}.{name}", 0
                for path, k in parts:
                    index, block = _index(leaf, shapes[path], i, k)
                    size = (math.prod(block[1:]), block[0]) if leaf == "kernel" else (math.prod(block),)
                    axis = joined.axis if leaf == "kernel" else OUT
                    region = tuple(slice(start, start + n) if a == axis else slice(0, n) for a, n in enumerate(size))
                    copies.append(Copy(key, region, path, index, block))
                    start += size[axis]
    return tuple(copies)


def _split(module: str) -> tuple[str, int | None]:
    """ "final_layer/modulation[1]" -> ("final_layer/modulation", 1)."""
    module, _, k = module.rstrip("]").partition("[")
    return module, int(k) if k else None


def _index(leaf: str, shape: Shape, i: int | None, k: int | None) -> tuple[tuple[int | slice, ...], Shape]:
    """Index and shape of layer i, feature slice k, of one of our leaves."""
    index = () if i is None else (i,)
    shape = shape[len(index):]
    if k is None:
        return index, shape
    inputs = 1 if leaf == "kernel" else 0  # a kernel's features come after its input axis
    return index + (slice(None),) * inputs + (k,), shape[:inputs] + shape[inputs + 1:]


@functools.lru_cache(maxsize=64)
def leaf_shapes(config: MMDiTConfig) -> Mapping[str, Shape]:
    """Our path -> shape, for every leaf of `acejax.init(config, key)`; makes no arrays."""
    tree = jax.eval_shape(lambda: mmdit.init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


@functools.lru_cache(maxsize=64)
def plan_for(config: MMDiTConfig, layout: str) -> tuple[Copy, ...]:
    """The plan of one transformer in one layout ("bfl" or "diffusers")."""
    return plan(LAYOUTS[layout], leaf_shapes(config))


def expected(config: MMDiTConfig, layout: str) -> dict[str, Shape]:
    """Foreign key -> shape of every tensor that a file of this model holds; makes no arrays."""
    # the last part of a joined tensor ends where the tensor ends
    return {copy.key: tuple(part.stop for part in copy.region) for copy in plan_for(config, layout)}


def tensors(config: MMDiTConfig, params: mmdit.Params, layout: str,
            dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Our tree as (foreign key, contiguous numpy array), made one at a time.

    `dtype` None keeps the tree's; where the parts of a joined tensor differ, the dtype that holds them all.

    Raises:
      ValueError: a tree that is not the config's.
    """
    ours, wanted = flatten_dict(params, sep="/"), leaf_shapes(config)
    for path in sorted(wanted.keys() | ours.keys()):
        found = ours[path].shape if path in ours else None
        if found != wanted.get(path):
            raise ValueError(f"params {path!r} has shape {found}, the config expects {wanted.get(path)}")

    shapes = expected(config, layout)
    for key, parts in _grouped(plan_for(config, layout), "key").items():
        tensor = np.empty(shapes[key], dtype or _common(ours[copy.path].dtype for copy in parts))
        for copy in parts:
            tensor[copy.region] = copy.to_torch(ours[copy.path])
        yield key, tensor


def leaves(config: MMDiTConfig, get: Callable[[str], Any], layout: str,
           dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Foreign tensors as (path, array) of our tree, made one at a time.

    Args:
      config: the model.
      get: foreign key -> something with `dtype` that gives an array when sliced: an array, or a tensor still on disk.
      layout: "bfl" or "diffusers".
      dtype: what to cast to; None keeps the stored one; where a leaf's tensors differ, the dtype that holds them all.
    """
    shapes = leaf_shapes(config)
    for path, parts in _grouped(plan_for(config, layout), "path").items():
        leaf = np.empty(shapes[path], dtype or _common(get(copy.key).dtype for copy in parts))
        for copy in parts:
            leaf[copy.index] = copy.from_torch(get(copy.key)[copy.region])
        yield path, leaf


def to_foreign(config: MMDiTConfig, params: mmdit.Params, layout: str, dtype: Any = None) -> dict[str, np.ndarray]:
    """All of `tensors`: foreign key -> array."""
    return dict(tensors(config, params, layout, dtype))


def from_foreign(config: MMDiTConfig, get: Callable[[str], Any], layout: str, dtype: Any = None) -> mmdit.Params:
    """All of `leaves`: our tree, of numpy arrays."""
    return unflatten_dict(dict(leaves(config, get, layout, dtype)), sep="/")


def _grouped(copies: Iterable[Copy], field: str) -> dict[str, list[Copy]]:
    groups: dict[str, list[Copy]] = {}
    for copy in copies:
        groups.setdefault(getattr(copy, field), []).append(copy)
    return groups


def _common(dtypes: Iterable[Any]) -> np.dtype:
    return np.dtype(functools.reduce(jnp.promote_types, dtypes))
