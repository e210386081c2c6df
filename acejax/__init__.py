"""ACE++ in JAX: instruction-based image creation and editing on FLUX, as pure functions.

    velocity = acejax.apply(config, params, tokens)

`import acejax` needs jax, flax and numpy alone, changes no jax setting and starts no backend; what reads files is
imported when it is first used.
"""

import importlib

from acejax import flow, lcu
from acejax.errors import UserError
from acejax.model import autoencoder
from acejax.model.config import AutoencoderConfig, Execution, MMDiTConfig
from acejax.model.mmdit import Tokens, apply, init

__version__ = "0.1.0"

_LAZY = {"load_mmdit": "acejax.weights.load", "save_mmdit": "acejax.weights.save", "Editor": "acejax.edit.editor"}

__all__ = ["AutoencoderConfig", "Editor", "Execution", "MMDiTConfig", "Tokens", "UserError", "apply", "autoencoder",
           "flow", "init", "lcu", "load_mmdit", "save_mmdit"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'acejax' has no attribute {name!r}")
