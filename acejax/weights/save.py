"""Write a transformer as one safetensors file that other programs read."""

import os
import pathlib
from typing import Any

from safetensors.numpy import save_file

from acejax.model.config import MMDiTConfig
from acejax.model.mmdit import Params
from acejax.weights import keymaps


def save_mmdit(path: str | os.PathLike, config: MMDiTConfig, params: Params, layout: str = "bfl",
               dtype: Any = None) -> None:
    """Write `params`; the file appears whole or not at all, and `load_mmdit` gives the same numbers back.

    The foreign tensors are made in memory before they are written.

    Args:
      path: a local file; its folder is made where it is absent.
      config: the model of `params`.
      params: as by `acejax.init`.
      layout: "bfl" (as FLUX and ACE++ are published) or "diffusers".
      dtype: what to store; None stores the parameters' own.

    Raises:
      ValueError: a tree that is not the config's, or an unknown layout.
    """
    if layout not in keymaps.LAYOUTS:
        raise ValueError(f"layout is {layout!r}; known: {', '.join(keymaps.LAYOUTS)}")
    path = pathlib.Path(path)
    tensors = keymaps.to_foreign(config, params, layout, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, beside, metadata={"format": "pt"})  # transformers refuses files without a format
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
