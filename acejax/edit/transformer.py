"""A transformer's weights on their way to a sampler: into eight bits on the device, or to the host's side of it.

Never more than one layer of a kernel is on the device in its stored dtype beside what stays there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from acejax.adapt.quantize import KINDS, quantize_kernel
from acejax.adapt.targets import select
from acejax.model.mmdit import Params
from acejax.model.modulation import split
from acejax.parallel import rules
from acejax.weights import load as weights
from acejax.weights.identify import Model

Read = Callable[..., np.ndarray]


def load(model: Model, mesh: Mesh | None = None, dtype: Any = jnp.bfloat16, *, eight_bits: str | None = None,
         offload: bool = False) -> tuple[Params, Params | None]:
    """(params, quant) of a model that is open, as `acejax.edit.sampler.Sampler` takes them.

    Args:
      mesh: where they go, by the rules of `acejax.parallel.rules`; None is the default device.
      dtype: of what is not in eight bits.
      eight_bits: "int8" or "float8" (`acejax.adapt.quantize`) for the kernels of all blocks; None: quant is None.
      offload: what makes modulation stays on the host, in `dtype`.
    """
    leaves = {path: (shape, read) for path, shape, read in weights.leaves(model, dtype)}
    shapes = unflatten_dict({path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, _) in leaves.items()}, sep="/")
    on_host = set(flatten_dict(split(shapes)[0], sep="/")) if offload else set()
    chosen = {f"{module}/kernel" for module in select(shapes)} - on_host if eight_bits else set()
    params, quant = {}, {}
    for path, (shape, read) in leaves.items():
        if path in on_host:
            params[path] = read()
        elif path in chosen:
            module = path.removesuffix("/kernel")
            quant[f"{module}/q"], quant[f"{module}/scale"] = _in_eight_bits(path, shape, read, mesh, eight_bits)
        else:
            params[path] = weights.put(shape, read, _sharding(path, shape, mesh))
    return unflatten_dict(params, sep="/"), unflatten_dict(quant, sep="/") if quant else None


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else rules.shardings({path: jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh)[path]


def _in_eight_bits(path: str, shape: tuple[int, ...], read: Read, mesh: Mesh | None, kind: str
                   ) -> tuple[jax.Array, jax.Array]:
    """(q, scale) of a stacked kernel [layers, in, *features], one layer after the other."""
    scales = (shape[0], *shape[2:])
    where = tuple(_sharding(path.replace("kernel", name), of, mesh) for name, of in (("q", shape), ("scale", scales)))
    one = _sharding(path, (1, *shape[1:]), mesh)
    filled = [jnp.zeros(of, dtype, device=there) for of, dtype, there in
              zip((shape, scales), (KINDS[kind][0], jnp.float32), where, strict=True)]
    for i in range(shape[0]):
        kernel = weights.put((1, *shape[1:]), functools.partial(_layer, read, i, len(shape)), one)
        filled = _insert(filled, quantize_kernel(kernel, kind, inputs=1), i, where=where)
    return tuple(filled)


def _layer(read: Read, i: int, axes: int, region: tuple[slice, ...] | None = None) -> np.ndarray:
    return read((slice(i, i + 1), *(region[1:] if region else (slice(None),) * (axes - 1))))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="where")
def _insert(filled: list[jax.Array], layer: tuple[jax.Array, jax.Array], i: int,
            where: tuple[NamedSharding | None, ...]) -> list[jax.Array]:
    made = [jax.lax.dynamic_update_slice_in_dim(old, new, i, 0) for old, new in zip(filled, layer, strict=True)]
    return [x if there is None else jax.lax.with_sharding_constraint(x, there)
            for x, there in zip(made, where, strict=True)]
