"""Read a transformer from one safetensors file: layout detected, every tensor accounted for, nothing executed."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from flax.traverse_util import unflatten_dict

from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.model.mmdit import Params
from acejax.weights import keymaps

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of an open file: shape and dtype from its header, numbers read where it is sliced."""

    file: Any
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, region: tuple[slice, ...]) -> np.ndarray:
        return self.file.get_slice(self.key)[region]


def load_mmdit(path: str | os.PathLike, config: MMDiTConfig | None = None, *,
               dtype: Any = None) -> tuple[MMDiTConfig, Params]:
    """Read a FLUX or ACE++ transformer, one leaf at a time from a memory map.

    Args:
      path: a local safetensors file in BFL's layout (also with ComfyUI's or swift's prefix) or in diffusers'.
      config: what the file must hold; None reads it off the tensors, for heads of 128 with FLUX's rope axes.
      dtype: dtype of the parameters; None keeps the stored one.

    Returns:
      The config and its parameters, shaped as by `acejax.init`.

    Raises:
      UserError: no such file, not a whole safetensors file, neither layout, a geometry that the tensors do not tell,
        or tensors that are missing, left over, of a wrong shape or of a dtype that is no plain float.
    """
    with _open(path) as file:
        found = {key: _stored(path, file, key) for key in file.keys()}  # noqa: SIM118 (no dict)
        layout, prefix = _detect(path, found)
        config = config or _read_config(path, found, layout, prefix)
        _check(path, found, {prefix + key: shape for key, shape in keymaps.expected(config, layout).items()}, layout)
        leaves = keymaps.leaves(config, lambda key: found[prefix + key], layout, dtype)
        return config, unflatten_dict({name: jnp.asarray(leaf) for name, leaf in leaves}, sep="/")


def _open(path: str | os.PathLike) -> Any:
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such file; expected one safetensors file")
    try:
        return safetensors.safe_open(os.fspath(path), framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: expected a whole safetensors file; found another format or one cut short ({error})"
                        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _stored(path: str | os.PathLike, file: Any, key: str) -> Stored:
    tensor = file.get_slice(key)
    if tensor.get_dtype() not in DTYPES:
        raise UserError(f"{path}: {key!r} is stored as {tensor.get_dtype()}; expected one of {', '.join(DTYPES)}")
    return Stored(file, key, tuple(tensor.get_shape()), np.dtype(DTYPES[tensor.get_dtype()]))


def _detect(path: str | os.PathLike, found: Mapping[str, Stored]) -> tuple[str, str]:
    """Layout and prefix, told by the name of the image tokens' projection."""
    markers = {layout: keymaps.LAYOUTS[layout].key("img_in/kernel") for layout in keymaps.LAYOUTS}
    for prefix in keymaps.PREFIXES:
        for layout, marker in markers.items():
            if prefix + marker in found:
                return layout, prefix
    some = ", ".join(sorted(found)[:3]) or "no tensors"
    wanted = " or ".join(f"{marker!r} ({layout})" for layout, marker in markers.items())
    raise UserError(f"{path}: not a FLUX transformer: expected {wanted}, alone or after 'model.diffusion_model.' or "
                    f"'model.'; found {some}{_more(found, 3)}")


def _read_config(path: str | os.PathLike, found: Mapping[str, Stored], layout: str, prefix: str) -> MMDiTConfig:
    """The geometry that shapes tell. How rope splits a head over its axes is in no tensor: heads must be FLUX's."""
    flux = MMDiTConfig()

    def name(leaf: str, layer: int | str = 0) -> str:
        return prefix + keymaps.LAYOUTS[layout].key(leaf).format(i=layer)

    def shape(leaf: str, axes: int = 2) -> tuple[int, ...]:
        tensor = found.get(name(leaf))
        if tensor is None or len(tensor.shape) != axes or 0 in tensor.shape:
            raise UserError(f"{path}: {name(leaf)!r} is {tensor.shape if tensor else 'missing'}; expected {axes} axes, "
                            "none empty, to read the config from (or give config=)")
        return tensor.shape

    def depth(leaf: str) -> int:
        pattern = re.escape(name(leaf, "LAYER")).replace("LAYER", "([0-9]{1,9})")
        layers = filter(None, (re.fullmatch(pattern, key) for key in found))
        return min(1 + max((int(layer[1]) for layer in layers), default=0), len(found))  # a wild number costs nothing

    hidden, channels = shape("img_in/kernel")
    (head,) = shape("double_blocks/img/query_norm/scale", axes=1)
    if head != flux.head_dim or hidden % head:
        raise UserError(f"{path}: {name('img_in/kernel')!r} has shape {(hidden, channels)} and "
                        f"{name('double_blocks/img/query_norm/scale')!r} has {(head,)}; expected FLUX's heads "
                        f"of {flux.head_dim} and a multiple of it, to read the config from (or give config=)")
    return MMDiTConfig(
        in_channels=channels, out_channels=shape("final_layer/linear/kernel")[0], hidden_size=hidden,
        num_heads=hidden // head, depth=depth("double_blocks/img/query_norm/scale"),
        depth_single_blocks=depth("single_blocks/query_norm/scale"),
        mlp_ratio=shape("double_blocks/img/mlp_in/kernel")[0] / hidden, context_in_dim=shape("txt_in/kernel")[1],
        vec_in_dim=shape("vector_in/in_layer/kernel")[1], guidance_embed=name("guidance_in/in_layer/kernel") in found)


def _check(path: str | os.PathLike, found: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]],
           layout: str) -> None:
    """Every expected tensor is there in its shape, and no other."""
    missing = [key for key in expected if key not in found]
    if missing:
        raise UserError(f"{path}: {missing[0]!r}{_more(missing)} is missing; expected {expected[missing[0]]} "
                        f"({len(expected)} tensors in the {layout} layout, found {len(found)})")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise UserError(f"{path}: {extra[0]!r}{_more(extra)} is left over, found {found[extra[0]].shape}; expected "
                        f"the {len(expected)} tensors of the {layout} layout alone")
    wrong = [key for key, shape in expected.items() if found[key].shape != shape]
    if wrong:
        raise UserError(f"{path}: {wrong[0]!r}{_more(wrong)} has shape {found[wrong[0]].shape}; "
                        f"expected {expected[wrong[0]]}")


def _more(keys: Any, shown: int = 1) -> str:
    return f" (and {len(keys) - shown} more)" if len(keys) > shown else ""
