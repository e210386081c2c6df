"""PyTorch's own files (.bin, .pt, .pth, .ckpt) as a source for conversion: torch reads them, and executes nothing."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from acejax.errors import UserError
from acejax.weights.source import Source

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = ("state_dict", "model")  # ACE_plus' loader takes `state_dict` or `model.model` off (ace_plus_ldm.py)


def open_pickle(path: pathlib.Path) -> Source:
    """The tensors of a file that `torch.save` made, memory-mapped where torch can.

    Raises:
      UserError: no torch; a file that is no state dict of tensors, or that would have to run code to be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} needs PyTorch (pip install torch --index-url "
                        "https://download.pytorch.org/whl/cpu); or give safetensors") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # whatever a broken or hostile file makes the unpickler say
        raise UserError(f"{path}: expected tensors saved by PyTorch and nothing else; found another format or code "
                        f"({type(error).__name__})") from None
    for wrapper in WRAPPERS * 2:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path}: expected a state dict, names to tensors; found {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise UserError(f"{path}: {key!r} is a {type(value).__name__}; expected a dense tensor")
    return Source(path, {key: _array(torch, value) for key, value in found.items()})


def _array(torch: Any, tensor: Any) -> np.ndarray:
    """The same memory as numpy; torch names no numpy dtype for the short floats."""
    tensor = tensor.detach()
    short = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
             torch.float8_e5m2: ml_dtypes.float8_e5m2}.get(tensor.dtype)
    if short is None:
        return tensor.numpy()
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.uint8).numpy().view(short)


def _is_zip(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
