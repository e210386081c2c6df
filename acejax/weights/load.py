"""Models from disk as parameters: every tensor accounted for, one shard of one leaf in host memory at a time."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from acejax.model.config import AutoencoderConfig, CLIPConfig, MMDiTConfig, T5Config
from acejax.parallel import rules
from acejax.weights import keymaps, layout
from acejax.weights.identify import Model, open_model
from acejax.weights.keymaps import Config

BY_LAYER = 2**28  # bytes from which a stacked leaf goes to a single device layer by layer
Path = str | os.PathLike


def load_mmdit(path: Path, config: MMDiTConfig | None = None, mesh: Mesh | None = None, *, dtype: Any = None,
               grow: int | str | None = None) -> tuple[MMDiTConfig, Any]:
    """Read a FLUX or ACE++ transformer.

    Args:
      path: a safetensors file in BFL's layout (also with ComfyUI's or swift's prefix) or in diffusers', an index of
        shards, a folder with one of them, or a diffusers pipeline's folder. Float8 is read as bfloat16.
      config: what the file must hold; None reads it off the tensors (and a `config.json` beside them).
      mesh: where the parameters go, by the rules of `acejax.parallel.rules`: one by `acejax.make_mesh`, or of some of
        its axes and no others, all Auto. None is the default device.
      dtype: dtype of the parameters; None keeps the stored one.
      grow: widen `img_in` to 384 or 448 channels, the velocity unchanged; see `acejax.weights.identify.open_model`.

    Returns:
      The config and its parameters, shaped as by `acejax.init`.

    Raises:
      UserError: another mesh; and see `acejax.weights.identify.open_model`.
    """
    return load(open_model(path, MMDiTConfig, config, grow=grow), mesh, dtype)


def load_autoencoder(path: Path, config: AutoencoderConfig | None = None, mesh: Mesh | None = None, *,
                     dtype: Any = None) -> tuple[AutoencoderConfig, Any]:
    """Read FLUX's autoencoder in BFL's (`ae.safetensors`) or diffusers' layout; the rest as `load_mmdit`."""
    return load(open_model(path, AutoencoderConfig, config), mesh, dtype)


def load_t5(path: Path, config: T5Config | None = None, mesh: Mesh | None = None, *,
            dtype: Any = None) -> tuple[T5Config, Any]:
    """Read a T5 v1.1 encoder in HF's layout; the rest as `load_mmdit`."""
    return load(open_model(path, T5Config, config), mesh, dtype)


def load_clip(path: Path, config: CLIPConfig | None = None, mesh: Mesh | None = None, *,
              dtype: Any = None) -> tuple[CLIPConfig, Any]:
    """Read a CLIP text encoder in HF's layout, with or without `text_model.`; the rest as `load_mmdit`."""
    return load(open_model(path, CLIPConfig, config), mesh, dtype)


def load(model: Model, mesh: Mesh | None = None, dtype: Any = None,
         each: Callable[[str, jax.Array], dict[str, jax.Array]] | None = None) -> tuple[Config, Any]:
    """The parameters of a model that is open; see `load_mmdit`.

    `each` gives what shall stand in a leaf's place, from its path: a model that is quantised is never there twice.
    """
    placement = _placement(keymaps.leaf_shapes(model.config), mesh)
    held = {}
    for path, shape, read in leaves(model, dtype):
        leaf = put(shape, read, placement[path])
        held |= {path: leaf} if each is None else each(path, leaf)
    return model.config, unflatten_dict(held, sep="/")


def leaves(model: Model, dtype: Any = None) -> Iterator[tuple[str, layout.Shape, Callable[..., np.ndarray]]]:
    """(path, shape, read) of each leaf of a model that is open; `read` as for `put`, `dtype` as for `load_mmdit`."""
    shapes, get = keymaps.leaf_shapes(model.config), model.tensors.__getitem__
    for path, copies in layout.grouped(keymaps.plan_for(model.config, model.layout), "path").items():
        stored = dtype or layout.dtype_of(copies, get)
        yield path, shapes[path], functools.partial(layout.leaf, copies, shapes[path], get, stored)


def _placement(shapes: dict[str, layout.Shape], mesh: Mesh | None) -> dict[str, NamedSharding | None]:
    if mesh is None:
        return dict.fromkeys(shapes)
    return rules.shardings({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}, mesh)


def put(shape: layout.Shape, read: Callable[..., np.ndarray], sharding: NamedSharding | None) -> jax.Array:
    """A leaf on its devices; the host holds one device's part at a time, or one layer of it for a single device.

    `read(region)` gives the part that slices of the leaf name, `read()` all of it.
    """
    if sharding is None:
        if len(shape) < 3 or np.prod(shape) * 4 < BY_LAYER:
            return jnp.asarray(read())
        return _by_layer(shape, read)
    parts = [jax.device_put(read(region), device).block_until_ready()
             for device, region in sharding.addressable_devices_indices_map(shape).items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _by_layer(shape: layout.Shape, read: Callable[..., np.ndarray]) -> jax.Array:
    """Fill a buffer on the device, in place."""
    rest = (slice(None),) * (len(shape) - 1)
    first = read((slice(0, 1), *rest))
    filled = jnp.zeros(shape, first.dtype)
    for i in range(shape[0]):
        filled = _insert(filled, first if i == 0 else read((slice(i, i + 1), *rest)), i)
    return filled


@functools.partial(jax.jit, donate_argnums=0)
def _insert(filled: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(filled, layer, i, 0)
