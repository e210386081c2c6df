"""ACE++ in JAX: instruction-based image creation and editing on FLUX, as pure functions.

    velocity = acejax.apply(config, params, tokens)

`import acejax` loads nothing heavy: a public name is imported when it is first used. The networks need jax, flax and
numpy alone; none of them changes a jax setting or starts a backend by being imported.
"""

import importlib
from typing import TYPE_CHECKING

from acejax.errors import UserError

if TYPE_CHECKING:  # what reads the source alone sees the centre here
    from acejax import flow, lcu
    from acejax.model import autoencoder, clip, t5
    from acejax.model.config import AutoencoderConfig, CLIPConfig, Execution, MMDiTConfig, T5Config
    from acejax.model.mmdit import Tokens, apply, init

__version__ = "0.1.0"

# public name -> the module that defines it, or that it is
_LAZY = {"flow": "acejax.flow", "lcu": "acejax.lcu", "model": "acejax.model", "autoencoder": "acejax.model.autoencoder",
         "clip": "acejax.model.clip", "t5": "acejax.model.t5", "Tokens": "acejax.model.mmdit",
         "apply": "acejax.model.mmdit", "init": "acejax.model.mmdit",
         "AutoencoderConfig": "acejax.model.config", "CLIPConfig": "acejax.model.config",
         "Execution": "acejax.model.config", "MMDiTConfig": "acejax.model.config", "T5Config": "acejax.model.config",
         "load_mmdit": "acejax.weights.load", "load_autoencoder": "acejax.weights.load",
         "load_t5": "acejax.weights.load", "load_clip": "acejax.weights.load", "save_model": "acejax.weights.save",
         "load_lora": "acejax.weights.lora_formats", "save_lora": "acejax.weights.lora_formats",
         "merge_lora": "acejax.adapt.lora", "make_mesh": "acejax.parallel.mesh", "Editor": "acejax.edit.editor"}

__all__ = ["AutoencoderConfig", "CLIPConfig", "Editor", "Execution", "MMDiTConfig", "T5Config", "Tokens", "UserError",
           "apply", "autoencoder", "clip", "flow", "init", "lcu", "load_autoencoder", "load_clip", "load_lora",
           "load_mmdit", "load_t5", "make_mesh", "merge_lora", "save_lora", "save_model", "t5"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'acejax' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
