"""Where arrays live on the mesh: ordered (regex, spec) rules over the paths of plain trees.

One rule set serves parameters, LoRA, quantised kernels, optimizer state and anything else whose paths end in the same
names. A spec names the trailing axes of a leaf, so stacked leaves [layers, in, out] need no rule of their own.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from acejax.errors import UserError

RULES = (
    # q: a quantised kernel
    (r"qkv/(kernel|q)$", ("fsdp", None, "tensor", None)),  # [in, 3, heads, head_dim]
    (r"qkv/bias$", (None, "tensor", None)),
    (r"modulation/(kernel|q)$", ("fsdp", None, "tensor")),  # [in, 6 or 3, hidden]
    (r"(proj|mlp_out|out_layer)/(kernel|q)$", ("tensor", "fsdp")),
    (r"modulation/bias$", (None, "tensor")),
    (r"mlp_in/bias$", ("tensor",)),
    (r"/(kernel|q)$", ("fsdp", "tensor")),
    # a LoRA pair: a [in, rank] lies as the kernel's inputs, b [rank, *features] as its features
    (r"(proj|mlp_out|out_layer)/a$", ("tensor", None)),
    (r"/a$", ("fsdp", None)),
    (r"qkv/b$", (None, None, "tensor", None)),
    (r"modulation/b$", (None, None, "tensor")),
    (r"(proj|mlp_out|out_layer)/b$", (None, "fsdp")),
    (r"/b$", (None, "tensor")),
    (r"", ()),
)
BATCH_AXES = ("data", "fsdp")


def path_of(keys: tuple[Any, ...]) -> str:
    """A tree path as "double_blocks/img/qkv/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf (array or ShapeDtypeStruct) by the first rule that matches its path.

    An axis that does not divide its dimension is left out, so tiny models run on any mesh.
    """
    def place(keys, leaf):
        path = path_of(keys)
        spec = next(spec for pattern, spec in RULES if re.search(pattern, path))
        if len(spec) > leaf.ndim:
            return NamedSharding(mesh, P())
        spec = (None,) * (leaf.ndim - len(spec)) + spec
        fits = (axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, leaf.shape, strict=True))
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_parts(mesh: Mesh, accumulate: int = 1) -> int:
    """Into how many parts a batch falls: over devices, and one after the other."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * accumulate


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError when a batch of this many samples does not fall into equal parts."""
    if batch_size % (parts := batch_parts(mesh, accumulate)):
        steps = f", in {accumulate} parts one after the other: {parts}" if accumulate > 1 else ""
        raise UserError(f"batch size {batch_size} is not a multiple of data x fsdp = {batch_parts(mesh)} of the mesh"
                        f"{steps}")


def constrain(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """The `Execution.constrain` of a mesh: batch axes everywhere, sequence at block edges, heads over `tensor`."""
    specs = {"hidden": P(BATCH_AXES, "seq", None), "heads": P(BATCH_AXES, None, "tensor", None)}

    def pin(x: jax.Array, kind: str) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, specs[kind]))

    return pin
