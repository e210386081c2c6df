"""The networks: pure `init` and `apply` functions over plain trees of arrays."""

import importlib

_MODULES = ("attention", "autoencoder", "clip", "config", "dense", "mmdit", "rope", "t5")


def __getattr__(name: str):
    """A module of the package is imported when it is first used: `config` alone does without jax."""
    if name not in _MODULES:
        raise AttributeError(f"module 'acejax.model' has no attribute {name!r}")
    return importlib.import_module(f"acejax.model.{name}")
