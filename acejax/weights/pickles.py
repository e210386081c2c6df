"""PyTorch's own files (.bin, .pt, .pth, .ckpt) as a source for conversion: torch reads them, and executes nothing."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from acejax.errors import UserError
from acejax.weights.source import NAMES, Source, exists, shown

OLDEST = (2, 6)  # CVE-2025-32434: before it, `weights_only` could be made to run code
WRAPPERS = ("state_dict", "model")  # ACE_plus' loader takes `state_dict` or `model.model` off (ace_plus_ldm.py)


def open_pickle(path: pathlib.Path) -> Source:
    """The tensors of a file that `torch.save` made, memory-mapped where torch can.

    Raises:
      UserError: no torch; a file that is no state dict of tensors, or that would have to run code to be read.
    """
    if not exists(path):
        raise UserError(f"{path}: no such file")
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} needs PyTorch (pip install torch --index-url "
                        "https://download.pytorch.org/whl/cpu); or give safetensors") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST:
        raise UserError(f"{path}: PyTorch {torch.__version__} reads such files unsafely; expected 2.6 or newer")
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
            raise UserError(f"{path}: {shown(key)} is a {type(value).__name__}; expected a dense tensor")
    return Source(path, {key: _array(path, key, torch, value) for key, value in found.items()})


def _array(path: pathlib.Path, key: str, torch: Any, tensor: Any) -> np.ndarray:
    """The same memory as numpy; torch names no numpy dtype for the short floats."""
    short = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
             torch.float8_e5m2: ml_dtypes.float8_e5m2}.get(tensor.dtype)
    try:
        tensor = tensor.detach()
        if short is not None:
            bits = torch.int16 if tensor.dtype.itemsize == 2 else torch.uint8
            return tensor.contiguous().view(bits).numpy().view(short)
        array = tensor.numpy()
        NAMES[array.dtype]
        return array
    except Exception:  # quantised, complex, on another device, lazily negated ...
        raise UserError(f"{path}: {shown(key)} is stored as {tensor.dtype}; expected plain numbers in memory") from None


def _is_zip(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
