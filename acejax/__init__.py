"""ACE++ in JAX: instruction-based image creation and editing on FLUX, as pure functions.

    velocity = acejax.apply(config, params, tokens)

`import acejax` needs jax, flax and numpy alone, changes no jax setting and starts no backend; what reads files is
imported when it is first used.
"""

import importlib

from acejax import flow, lcu
from acejax.errors import UserError
from acejax.model import autoencoder, clip, t5
from acejax.model.config import AutoencoderConfig, CLIPConfig, Execution, MMDiTConfig, T5Config
from acejax.model.mmdit import Tokens, apply, init

__version__ = "0.1.0"

_LAZY = {"load_mmdit": "acejax.weights.load", "load_autoencoder": "acejax.weights.load",
         "load_t5": "acejax.weights.load", "load_clip": "acejax.weights.load", "save_model": "acejax.weights.save",
         "load_lora": "acejax.weights.lora_formats", "save_lora": "acejax.weights.lora_formats",
         "merge_lora": "acejax.adapt.lora", "Editor": "acejax.edit.editor"}

__all__ = ["AutoencoderConfig", "CLIPConfig", "Editor", "Execution", "MMDiTConfig", "T5Config", "Tokens", "UserError",
           "apply", "autoencoder", "clip", "flow", "init", "lcu", "load_autoencoder", "load_clip", "load_lora",
           "load_mmdit", "load_t5", "merge_lora", "save_lora", "save_model", "t5"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'acejax' has no attribute {name!r}")
