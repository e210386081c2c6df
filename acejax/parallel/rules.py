"""Where arrays live on the mesh: ordered (regex, spec) rules over the paths of plain trees.

One rule set serves parameters, LoRA, quantised kernels, optimizer state and anything else whose paths end in the same
names. A spec names the trailing axes of a leaf, so stacked leaves [layers, in, out] need no rule of their own.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from acejax.errors import UserError
from acejax.parallel import mesh as meshes

RULES = (
    (r"/v_(row|col)/", ()),  # Adafactor's means over one axis of a kernel: small, and of other axes than the kernel's
    # q: a quantised kernel
    (r"qkv/(kernel|q)$", ("fsdp", None, "tensor", None)),  # [in, 3, heads, head_dim]
    (r"qkv/(kernel|q)_parts$", ("fsdp", None, "tensor")),  # on its way to a product, [in, 3, heads * head_dim]
    (r"qkv/b_parts$", (None, None, "tensor")),
    (r"qkv/parts$", (None, "fsdp", "tensor")),  # held so (`acejax.model.dense.parts_first`), [3, in, heads * head_dim]
    (r"qkv/bias$", (None, "tensor", None)),
    (r"modulation/(kernel|q)$", ("fsdp", None, "tensor")),  # [in, 6 or 3, hidden]
    (r"(proj|mlp_out|out_layer)/(kernel|q)$", (("tensor", "fsdp"), None)),
    (r"modulation/bias$", (None, "tensor")),
    (r"mlp_in/bias$", ("tensor",)),
    (r"/(kernel|q)$", ("fsdp", "tensor")),
    # a LoRA pair: a [in, rank] lies as the kernel's inputs, b [rank, *features] as its features
    (r"(proj|mlp_out|out_layer)/a$", (("tensor", "fsdp"), None)),
    (r"/a$", ("fsdp", None)),
    (r"qkv/b$", (None, None, "tensor", None)),
    (r"modulation/b$", (None, None, "tensor")),
    (r"(proj|mlp_out|out_layer)/b$", (None, None)),
    (r"/b$", (None, "tensor")),
    (r"", ()),
)
# In this order. With ("data", "fsdp") XLA swaps rows of a product without a word (on CPU and TPU, jax 0.4.30 to 0.12)
# where its inputs lie over `tensor`, its kernel over (tensor, fsdp), fsdp = tensor and data > 1.
# `acejax.parallel.swaps` finds it in a compiled program.
BATCH_AXES = ("fsdp", "data")
HIDDEN = P(BATCH_AXES, "seq", None)  # [B, S, D], a stream
HEADS = P(BATCH_AXES, None, ("tensor", "seq"))  # [B, S, heads * head_dim] in attention: all tokens of some heads


def path_of(keys: tuple[Any, ...]) -> str:
    """A tree path as "double_blocks/img/qkv/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf (array or ShapeDtypeStruct) by the first rule that matches its path.

    An axis that does not divide its dimension, or that the mesh does not have, is left out: so tiny models run on any
    mesh.

    Raises:
      UserError: a mesh whose axes have other names or are not Auto (`acejax.make_mesh` makes one).
    """
    meshes.check(mesh)

    def place(keys, leaf):
        path = path_of(keys)
        return NamedSharding(mesh, _fit(_rule(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def _rule(path: str) -> tuple[Any, ...]:
    return next(spec for pattern, spec in RULES if re.search(pattern, path))


def _fit(spec: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec of a leaf's trailing axes for its whole shape, as far as the mesh has its axes and they divide it."""
    if len(spec) > len(shape):
        return P()
    spec = (None,) * (len(shape) - len(spec)) + spec

    def fits(axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        kept = ()
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis in mesh.shape and size % parts(mesh, *kept, axis) == 0:
                kept = (*kept, axis)
        return kept[0] if len(kept) == 1 else kept or None

    return P(*map(fits, spec, shape))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over the fsdp and data axes."""
    meshes.check(mesh)
    return NamedSharding(mesh, on(mesh, P(BATCH_AXES)))


def on(mesh: Mesh, spec: P) -> P:
    """A spec without the axes that a mesh does not have: they count as 1."""
    def kept(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if axes is None or isinstance(axes, str):
            return axes if axes in mesh.shape else None
        return tuple(axis for axis in axes if axis in mesh.shape) or None

    return P(*map(kept, spec))


def parts(mesh: Mesh, *axes: str) -> int:
    """Into how many parts these axes of a mesh cut something."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def batch_parts(mesh: Mesh, accumulate: int = 1) -> int:
    """Into how many parts a batch falls: over devices, and one after the other."""
    return parts(mesh, *BATCH_AXES) * accumulate


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError when a batch of this many samples does not fall into equal parts."""
    if batch_size % (count := batch_parts(mesh, accumulate)):
        steps = f", in {accumulate} parts one after the other: {count}" if accumulate > 1 else ""
        raise UserError(f"batch size {batch_size} is not a multiple of data x fsdp = {batch_parts(mesh)} of the mesh"
                        f"{steps}")


def constrain(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """The `Execution.constrain` of a mesh: samples over the batch axes, tokens over `seq`, heads over `tensor`.

    Attention needs all tokens of a head. "heads" takes its inputs from a device's tokens of all heads to all tokens of
    its heads, "tokens" takes what it gives back (DeepSpeed-Ulysses, arXiv:2309.14509). Both ends of the way are
    written out: so XLA makes one all-to-all of it, forward and backward, where one end alone gathers the sequence.

    Modulation's kernels stay where they are: the vectors of all samples ("vector") go to the parts of their inputs, and
    what these make of them is summed ("modulation"). Its gradient is then a product of small arrays on each device, and
    not an outer product as large as the kernel that is summed over all of them.

    Everything that is added to or multiplied with a stream is pinned as the stream is, forward and (as a pin holds for
    the cotangent too) backward.
    """
    meshes.check(mesh)
    tokens = P(BATCH_AXES, "seq", "tensor")
    ways = {"hidden": (HIDDEN,), "heads": (tokens, HEADS), "tokens": (HEADS, tokens),
            "row": (P(BATCH_AXES, None),),
            # gathered, then cut: no permutes; one axis after the other, as over a whole torus of three axes there is
            # no all-gather (`meshes.in_stages`)
            "vector": (P(BATCH_AXES, None), P(BATCH_AXES[0], None), P(None, None), P(None, "fsdp")),
            "modulation": (P(None, None, "tensor"), P(None, None, None), P(BATCH_AXES[0], None, None),
                           P(BATCH_AXES, None, None))}

    def pin(x: jax.Array, kind: str) -> jax.Array:
        for spec in ways[kind]:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _fit(tuple(spec), x.shape, mesh)))
        return x

    return pin


def gather(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """The `Execution.gather` of a mesh: brings a kernel's parts over `fsdp` together before its product.

    Its gradient goes back as it came: summed over the batch and cut over `fsdp`, a reduce-scatter. `tensor` stays as it
    lies. A product whose inputs lie over both is never left to XLA: it makes partial products of it that add into
    memory, and with a batch over (data, fsdp) it has swapped rows without a word (findings/xla-swapped-rows.sh).

    Modulation stays where it is (`constrain`): one vector a sample meets a quarter of the weights.
    """
    meshes.check(mesh)

    staged = meshes.in_stages(mesh)

    def pin(kernel: jax.Array, spec: P, over: Mesh = mesh) -> jax.Array:
        return jax.lax.with_sharding_constraint(kernel, NamedSharding(over, spec))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def together(kernel, spec):
        if staged is not None:
            kernel = pin(kernel, _renamed(spec, "fsdp", "outer"), staged)
        return pin(kernel, _renamed(spec, "fsdp", None))

    together.defvjp(lambda kernel, spec: (together(kernel, spec), None),
                    lambda spec, _, gradient: (pin(gradient, spec),))

    def bring(kernel: jax.Array, path: str) -> jax.Array:
        if "/modulation/" in path:
            return kernel
        return together(kernel, _fit(_rule(path), kernel.shape, mesh))

    return bring


def _renamed(spec: P, axis: str, name: str | None) -> P:
    """A spec with another name for an axis, or without it."""
    def one(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        axes = (axes,) if isinstance(axes, str) else axes or ()
        renamed = (name if found == axis else found for found in axes)
        return tuple(found for found in renamed if found) or None

    return P(*map(one, spec))


def share(mesh: Mesh) -> Callable[[Callable[..., jax.Array], str], Callable[..., jax.Array]]:
    """The `Execution.share` of a mesh: kernels fall apart by samples, and by heads or tokens. TPUs must be told so."""
    meshes.check(mesh)
    rows = on(mesh, P(BATCH_AXES))
    kinds = {"heads": on(mesh, HEADS), "hidden": on(mesh, HIDDEN)}

    def each(kernel: Callable[..., jax.Array], kind: str) -> Callable[..., jax.Array]:
        streams = kinds[kind]
        return jax.shard_map(kernel, mesh=mesh, in_specs=(streams, rows, P()), out_specs=streams,
                             check_vma=False)  # kernels do not say over which axes their results vary

    return each


def check_heads(mesh: Mesh, heads: int) -> None:
    """Raises UserError when a model's attention heads do not fall into equal parts."""
    if heads % (count := parts(mesh, "tensor", "seq")):
        raise UserError(f"config.model.num_heads is {heads}, no multiple of tensor x seq = {count} of the mesh")


def check_tokens(mesh: Mesh, name: str, tokens: int) -> None:
    """Raises UserError when a sample's tokens, of which `name` tells, do not fall into equal parts."""
    if tokens % (count := parts(mesh, "seq")):
        raise UserError(f"{name}: {tokens} tokens are no multiple of the mesh's seq = {count}")
