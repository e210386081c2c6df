"""Weights that a run starts from: any source that `acejax convert` reads, its channels grown to the model's."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from acejax import checkpoint
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import convert, hub, identify, pickles
from acejax.weights.identify import Model
from acejax.weights.load import load
from acejax.weights.source import PICKLES, exists, open_source

INPUTS = ("img_in.weight", "x_embedder.weight")  # BFL's and diffusers' names


def open_start(source: str, config: MMDiTConfig) -> Model:
    """A transformer to start from; of files, only headers are read.

    64 channels (text to image) or 384 (Fill) grow to the model's by columns of zeros, each block of columns at its
    place, so that the velocity stays what it was.

    Args:
      source: a safetensors file, a folder, a diffusers pipeline, a PyTorch file, a hub id, an Orbax folder, a workdir.
      config: the run's model.

    Raises:
      UserError: what `acejax.weights.identify` finds wrong, or a model of another geometry.
    """
    path = hub.fetch(source) if hub.looks_like_id(source) else pathlib.Path(source).expanduser()
    if exists(path / "model.json") or exists(path / "checkpoints"):
        model = convert.of_tree(path, *checkpoint.load_weights(path))
        if dataclasses.replace(model.config, in_channels=config.in_channels) != config:
            raise UserError(f"{path}: found {model.config}; config.model is {config}, and only in_channels may grow")
        return model if model.config == config else identify.grown(model, config.in_channels)
    found = pickles.open_pickle(path) if path.suffix in PICKLES else open_source(
        identify.pipeline(path).get(identify.KINDS[MMDiTConfig][1], path))
    channels = {tensor.shape[-1] for key, tensor in found.tensors.items() if key.endswith(INPUTS)}
    grow = config.in_channels if channels - {config.in_channels} and config.in_channels in identify.GROW else None
    return identify.identify(found, MMDiTConfig, config, grow=grow)


def load_start(source: str, config: MMDiTConfig, mesh: Mesh) -> Any:
    """Its parameters in float32 on the mesh, by the rules of `acejax.parallel.rules`."""
    return load(open_start(source, config), mesh, jnp.float32)[1]
