"""Which foreign tensor holds which part of our trees: one table per model and layout (`layout` says how to read them).

Names: black-forest-labs/flux `model.py` and `modules/layers.py` (ACE_plus `modules/flux.py` keeps them); diffusers
`models/transformers/transformer_flux.py`. The autoencoder's and the text encoders' tables
stand in `tables_autoencoder` and `tables_text`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from acejax.model.config import AutoencoderConfig, CLIPConfig, MMDiTConfig, T5Config
from acejax.weights import layout as layouts
from acejax.weights import shapes, tables_autoencoder, tables_text, trees
from acejax.weights.layout import IN, OUT, Copy, Joined, Layout, Shape

# ComfyUI; swift and scepter; BFL and diffusers themselves. The first is what we write.
COMFY = "model.diffusion_model."
PREFIXES = ("", "model.", COMFY)

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
}, marker="img_in/kernel", prefixes=PREFIXES)

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
}, marker="img_in/kernel", prefixes=PREFIXES)

LAYOUTS = {"bfl": BFL, "diffusers": DIFFUSERS}  # of the transformer

Config = MMDiTConfig | AutoencoderConfig | T5Config | CLIPConfig
_LAYOUTS = {MMDiTConfig: lambda config: LAYOUTS, AutoencoderConfig: tables_autoencoder.layouts,
            T5Config: lambda config: tables_text.T5, CLIPConfig: lambda config: tables_text.CLIP}


def layouts_of(config: Config) -> Mapping[str, Layout]:
    """The layouts that a model is stored in, by name."""
    return _LAYOUTS[type(config)](config)


@functools.lru_cache(maxsize=64)
def leaf_shapes(config: Config) -> Mapping[str, Shape]:
    """Our path -> shape, for every leaf of the model's `init(config, key)`; makes no arrays."""
    if isinstance(config, MMDiTConfig):
        return shapes.transformer(config)
    import jax

    from acejax.model import autoencoder, clip, t5

    init = {AutoencoderConfig: autoencoder.init, T5Config: t5.init, CLIPConfig: clip.init}[type(config)]
    tree = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in trees.flat(tree).items()}


@functools.lru_cache(maxsize=64)
def plan_for(config: Config, layout: str) -> tuple[Copy, ...]:
    """The plan of one model in one layout."""
    return layouts.plan(layouts_of(config)[layout], leaf_shapes(config))


def expected(config: Config, layout: str) -> dict[str, Shape]:
    """Foreign key -> shape of every tensor that a file of this model holds; makes no arrays."""
    return layouts.foreign_shapes(plan_for(config, layout))


def check_tree(config: Config, params: Any) -> None:
    """Raises ValueError for a tree that is not the config's."""
    ours, wanted = trees.flat(params), leaf_shapes(config)
    for path in sorted(wanted.keys() | ours.keys()):
        found = ours[path].shape if path in ours else None
        if found != wanted.get(path):
            raise ValueError(f"params {path!r} has shape {found}, the config expects {wanted.get(path)}")


def tensors(config: Config, params: Any, layout: str, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Our tree as (foreign key, contiguous numpy array), made one at a time.

    `dtype` None keeps the tree's; where the parts of a joined tensor differ, the dtype that holds them all.

    Raises:
      ValueError: a tree that is not the config's.
    """
    check_tree(config, params)
    ours, wanted = trees.flat(params), expected(config, layout)
    for key, copies in layouts.grouped(plan_for(config, layout), "key").items():
        stored = dtype or layouts.common(ours[copy.path].dtype for copy in copies)
        yield key, layouts.tensor(copies, wanted[key], ours, stored)


def to_foreign(config: Config, params: Any, layout: str, dtype: Any = None) -> dict[str, np.ndarray]:
    """All of `tensors`: foreign key -> array."""
    return dict(tensors(config, params, layout, dtype))


def from_foreign(config: Config, get: Callable[[str], Any], layout: str, dtype: Any = None) -> Any:
    """Our tree, of numpy arrays, from foreign tensors: `get` is key -> array, or a tensor still on disk.

    `dtype` None keeps the stored one; where a leaf's tensors differ, the dtype that holds them all.
    """
    wanted = leaf_shapes(config)
    made = {path: layouts.leaf(copies, wanted[path], get, dtype or layouts.dtype_of(copies, get))
            for path, copies in layouts.grouped(plan_for(config, layout), "path").items()}
    return trees.nested(made)
