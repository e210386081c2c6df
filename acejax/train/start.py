"""Weights that a run starts from: any source that `acejax convert` reads, its channels grown to the model's."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from acejax import checkpoint
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.parallel import rules
from acejax.weights import hub, identify, pickles
from acejax.weights.identify import Model
from acejax.weights.load import load
from acejax.weights.source import PICKLES, open_source

INPUTS = ("img_in.weight", "x_embedder.weight")  # BFL's and diffusers' names


def check_start(source: str, config: MMDiTConfig) -> None:
    """Raises UserError where `load_start` would; of files, only headers and notes are read."""
    if _is_orbax(source):
        found = checkpoint.weights_config(source)
        if not isinstance(found, MMDiTConfig) or dataclasses.replace(found, in_channels=config.in_channels) != config:
            raise UserError(f"{source}: found {found}; config.model is {config}, and only in_channels may grow")
        identify.columns(found.in_channels, config.in_channels)
    else:
        _open(source, config)


def load_start(source: str, config: MMDiTConfig, mesh: Mesh, dtype: Any = jnp.float32) -> Any:
    """Parameters to start from, in `dtype` on the mesh, by the rules of `acejax.parallel.rules`.

    64 channels (text to image) or 384 (Fill) grow to the model's by columns of zeros, each block of columns at its
    place, so that the velocity stays what it was. Of a run that averages its parameters, the average is taken.

    Args:
      source: a safetensors file, a folder, a diffusers pipeline, a PyTorch file, a hub id, an Orbax folder, a workdir.
      config: the run's model.

    Raises:
      UserError: what `acejax.weights.identify` or `acejax.checkpoint.load_weights` finds wrong, or a model of another
        geometry.
    """
    check_start(source, config)
    if not _is_orbax(source):
        return load(_open(source, config), mesh, jnp.dtype(dtype))[1]
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
    return params


def _is_orbax(source: str) -> bool:
    path = epath.Path(source).expanduser()
    return not hub.looks_like_id(source) and ((path / "model.json").exists() or (path / "checkpoints").exists())


def _open(source: str, config: MMDiTConfig) -> Model:
    path = hub.fetch(source) if hub.looks_like_id(source) else pathlib.Path(source).expanduser()
    found = pickles.open_pickle(path) if path.suffix in PICKLES else open_source(
        identify.pipeline(path).get(identify.KINDS[MMDiTConfig][1], path))
    channels = {tensor.shape[-1] for key, tensor in found.tensors.items() if key.endswith(INPUTS)}
    grow = config.in_channels if channels - {config.in_channels} and config.in_channels in identify.GROW else None
    return identify.identify(found, MMDiTConfig, config, grow=grow)
