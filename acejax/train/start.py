"""Weights that a run starts from: any source that `acejax convert` reads, its channels grown to the model's."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from acejax import checkpoint
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.parallel import rules
from acejax.weights import hub, identify, pickles, trees
from acejax.weights.identify import Model
from acejax.weights.load import load
from acejax.weights.source import PICKLES, Source, open_source

INPUTS = ("img_in.weight", "x_embedder.weight")  # BFL's and diffusers' names


def check_start(source: str, config: MMDiTConfig, grow: bool = True) -> None:
    """Raises UserError where `load_start` would; of files, only headers and notes are read.

    Without `grow` the model must have its channels already: a LoRA trains no inputs.
    """
    if _is_orbax(source):
        found = checkpoint.weights_config(source)
        if not isinstance(found, MMDiTConfig) or dataclasses.replace(found, in_channels=config.in_channels) != config:
            raise UserError(f"{source}: found {found}; config.model is {config}, and only in_channels may grow")
        identify.columns(found.in_channels, config.in_channels)
        channels = found.in_channels
    else:
        channels = _channels(_source(source))
        _open(source, config)
    if not grow and channels != config.in_channels:
        raise UserError(f"{source}: reads {channels} channels, config.model.in_channels is {config.in_channels}; a "
                        "LoRA would never learn the others, as it does not train img_in")


def load_start(source: str, config: MMDiTConfig, mesh: Mesh, dtype: Any = jnp.float32,
               each: Callable[[str, jax.Array], dict[str, jax.Array]] | None = None) -> Any:
    """Parameters to start from, in `dtype` on the mesh, by the rules of `acejax.parallel.rules`.

    64 channels (text to image) or 384 (Fill) grow to the model's by columns of zeros, each block of columns at its
    place, so that the velocity stays what it was. Of a run that averages its parameters, the average is taken.

    Args:
      source: a safetensors file, a folder, a diffusers pipeline, a PyTorch file, a hub id, an Orbax folder, a workdir.
      config: the run's model.
      each: what to put in a leaf's place, as `acejax.weights.load.load`.

    Raises:
      UserError: what `acejax.weights.identify` or `acejax.checkpoint.load_weights` finds wrong, or a model of another
        geometry.
    """
    check_start(source, config)
    if not _is_orbax(source):
        return load(_open(source, config), mesh, jnp.dtype(dtype), each)[1]
    place = functools.partial(rules.shardings, mesh=mesh)
    found, params = checkpoint.load_weights(source, ema=True, place=place)
    blocks = identify.columns(found.in_channels, config.in_channels)

    def widen(kernel: jax.Array) -> jax.Array:
        wide = jnp.zeros((config.in_channels, kernel.shape[1]), kernel.dtype)
        for old, first in blocks:
            wide = wide.at[first:first + old.stop - old.start].set(kernel[old])
        return wide

    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    kernel = params["img_in"]["kernel"]
    shardings = place({"img_in": {"kernel": jax.eval_shape(widen, kernel)}})["img_in"]
    params["img_in"]["kernel"] = jax.jit(widen, out_shardings=shardings["kernel"])(kernel)
    if each is None:
        return params
    return trees.nested({name: new for path, leaf in trees.flat(params).items()
                         for name, new in each(path, leaf).items()})


def _is_orbax(source: str) -> bool:
    path = epath.Path(source).expanduser()
    return not hub.looks_like_id(source) and ((path / "model.json").exists() or (path / "checkpoints").exists())


def _open(source: str, config: MMDiTConfig) -> Model:
    found = _source(source)
    grows = _channels(found) not in (None, config.in_channels) and config.in_channels in identify.GROW
    return identify.identify(found, MMDiTConfig, config, grow=config.in_channels if grows else None)


def _source(source: str) -> Source:
    path = hub.local(source)
    return pickles.open_pickle(path) if path.suffix in PICKLES else open_source(
        identify.pipeline(path).get(identify.KINDS[MMDiTConfig][1], path))


def _channels(source: Source) -> int | None:
    """Of the input layer; None where there is none, which `identify` tells of."""
    return next((tensor.shape[-1] for key, tensor in source.tensors.items() if key.endswith(INPUTS)), None)
