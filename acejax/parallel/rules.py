"""Where arrays live on the mesh: ordered (regex, spec) rules over the paths of plain trees.

One rule set serves parameters, LoRA, quantised kernels, optimizer state and anything else whose paths end in the same
names. A spec names the trailing axes of a leaf, so stacked leaves [layers, in, out] need no rule of their own.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from acejax.errors import UserError

RULES = (
    (r"/v_(row|col)/", ()),  # Adafactor's means over one axis of a kernel: small, and of other axes than the kernel's
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
HEADS = P(BATCH_AXES, None, ("tensor", "seq"), None)  # [B, S, heads, head_dim] in attention: all tokens of some heads


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
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def _fit(spec: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec of a leaf's trailing axes for its whole shape; an axis that does not divide its dimension is left out."""
    if len(spec) > len(shape):
        return P()
    spec = (None,) * (len(shape) - len(spec)) + spec
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=True)))


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
    """The `Execution.constrain` of a mesh: samples over the batch axes, tokens over `seq`, heads over `tensor`.

    Attention needs all tokens of a head. "heads" takes its inputs from a device's tokens of all heads to all tokens of
    its heads, "tokens" takes what it gives back (DeepSpeed-Ulysses, arXiv:2309.14509). Both ends of the way are
    written out: so XLA makes one all-to-all of it, forward and backward, where one end alone gathers the sequence.

    Everything that is added to or multiplied with a stream is pinned as the stream is, forward and (as a pin holds for
    the cotangent too) backward. Where XLA chose, it computed wrong sums, silently, on data 2 x fsdp 2 x tensor 2: a
    product over a kernel that lies over both `tensor` and `fsdp`, times a gate over `tensor` (jax 0.10 to 0.12).
    """
    hidden, tokens = P(BATCH_AXES, "seq", None), P(BATCH_AXES, "seq", "tensor", None)
    ways = {"hidden": (hidden,), "modulation": (P(BATCH_AXES, None, None),),
            "heads": (_heads_first(tokens), _heads_first(HEADS)), "tokens": (HEADS, tokens)}

    def pin(x: jax.Array, kind: str) -> jax.Array:
        for spec in ways[kind]:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x

    return pin


def gather(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """The `Execution.gather` of a mesh: a kernel's parts over `fsdp` are brought together before its product, and what
    it gets back as gradient is summed into them. `tensor` stays as it lies.
    """
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def whole(kernel, path):
        return jax.lax.with_sharding_constraint(kernel, place(kernel, path, keep_fsdp=False))

    def forward(kernel, path):
        return whole(kernel, path), None

    def backward(path, _, gradient):
        return (jax.lax.with_sharding_constraint(gradient, place(gradient, path, keep_fsdp=True)),)

    def place(kernel, path, keep_fsdp):
        spec = _fit(next(spec for pattern, spec in RULES if re.search(pattern, path)), kernel.shape, mesh)
        return NamedSharding(mesh, spec if keep_fsdp else P(*(None if axis == "fsdp" else axis for axis in spec)))

    whole.defvjp(forward, backward)
    return lambda kernel, path: kernel if "modulation" in path else whole(kernel, path)


def _heads_first(spec: P) -> P:
    batch, tokens, heads, size = spec
    return P(batch, heads, tokens, size)


def share(mesh: Mesh) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """The `Execution.share` of a mesh: attention falls apart by samples and heads. TPU kernels must be told so."""
    def each(attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return jax.shard_map(attention, mesh=mesh, in_specs=(HEADS, HEADS, HEADS, P(BATCH_AXES)), out_specs=HEADS,
                             check_vma=False)  # kernels do not say over which axes their results vary

    return each


def check_heads(mesh: Mesh, heads: int) -> None:
    """Raises UserError when a model's attention heads do not fall into equal parts."""
    if heads % (parts := mesh.shape["tensor"] * mesh.shape["seq"]):
        raise UserError(f"config.model.num_heads is {heads}, no multiple of tensor x seq = {parts} of the mesh")


def check_tokens(mesh: Mesh, name: str, tokens: int) -> None:
    """Raises UserError when a sample's tokens, of which `name` tells, do not fall into equal parts."""
    if tokens % (parts := mesh.shape["seq"]):
        raise UserError(f"{name}: {tokens} tokens are no multiple of the mesh's seq = {parts}")
