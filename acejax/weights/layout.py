"""How a foreign file stores a model: the machinery behind the tables of `keymaps`, read in both directions.

A `Layout` is a table. A row names a foreign module ("{i}" is the layer), the modules of ours it is made of, and the
axis they are joined along. A trailing `[k]` takes one slice of our module's first feature axis: q, k or v of `qkv`;
shift, scale or gate of a modulation. `plan` expands a table to copies of blocks, which is all that import, export and
conversion need. A copy also knows which rows of our leaf's *torch form* it holds (a weight as torch has it, [out, in]):
two layouts meet there, without a detour through our tree.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
OUT, IN = 0, 1  # axes of a torch weight


@dataclasses.dataclass(frozen=True)
class Joined:
    """Our modules, in order along one axis of the foreign weight; a foreign bias joins the biases there are."""

    modules: tuple[str, ...]
    axis: int = OUT


@dataclasses.dataclass(frozen=True)
class Conv:
    """Our convolution [kh, kw, in, out], or (`pointwise`) our linear module that the file has as a 1x1 convolution."""

    module: str
    pointwise: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to store a model.

    Attributes:
      leaves: our leaf name -> the foreign one; "kernel", "bias", "scale" or "embedding".
      modules: foreign module -> ours.
      marker: our leaf whose foreign key tells the layout.
      prefixes: what may stand before every key; the first one is written.
      twins: key -> the key that it repeats; a file may hold either or both.
      ignored: keys that some files hold and no model needs.
    """

    leaves: Mapping[str, str]
    modules: Mapping[str, str | Joined | Conv]
    marker: str
    prefixes: tuple[str, ...] = ("",)
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def key(self, path: str) -> str:
        """The foreign key that stores our leaf `path` ("img_in/kernel") whole and alone."""
        module, leaf = path.rsplit("/", 1)
        alone = (module, Conv(module), Conv(module, pointwise=True))
        return next(f"{name}.{self.leaves[leaf]}" for name, ours in self.modules.items() if ours in alone)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Foreign `key[region]` and our `path[index]` hold the same numbers, ours in the shape `block`.

    Attributes:
      form: "linear" ([in, *features], torch [out, in]), "conv" ([kh, kw, in, out], torch [out, in, kh, kw]) or "plain".
      shape: of the region, as torch has it.
      rows: (start, stop) of the region among the rows of our leaf's torch form, in one layer.
      layer: of a stacked leaf, else None.
    """

    key: str
    region: tuple[slice, ...]
    path: str
    index: tuple[int | slice, ...]
    block: Shape
    form: str
    shape: Shape
    rows: tuple[int, int]
    layer: int | None

    def to_torch(self, leaf: Any) -> np.ndarray:
        """Our leaf -> the region's numbers; a view where numpy can."""
        block = np.asarray(leaf)[self.index]
        if self.form == "linear":
            block = block.reshape(block.shape[0], -1).T
        elif self.form == "conv":
            block = block.transpose(3, 2, 0, 1)
        return block.reshape(self.shape)

    def from_torch(self, region: np.ndarray) -> np.ndarray:
        """The inverse: the region's numbers -> our block."""
        if self.form == "linear":
            region = region.reshape(region.shape[:2]).T
        elif self.form == "conv":
            region = region.transpose(2, 3, 1, 0)
        return region.reshape(self.block)


def plan(layout: Layout, shapes: Mapping[str, Shape]) -> tuple[Copy, ...]:
    """Expand a table over a model's leaves (`shapes`: our path -> shape); rows of absent modules fall away."""
    copies = []
    for module, ours in layout.modules.items():
        joined = ours if isinstance(ours, Joined) else Joined((ours.module if isinstance(ours, Conv) else ours,))
        for leaf, name in layout.leaves.items():
            parts = [(f"{part}/{leaf}", k) for part, k in map(split, joined.modules) if f"{part}/{leaf}" in shapes]
            if not parts:
                continue
            for i in range(shapes[parts[0][0]][0]) if "{i}" in module else [None]:
                key, start = f"{module.format(i=i)}.{name}", 0
                for path, k in parts:
                    index, block = _index(leaf, shapes[path], i, k)
                    form, shape = _torch(leaf, block, ours)
                    axis = joined.axis if leaf == "kernel" else OUT
                    region = tuple(slice(start, start + n) if a == axis else slice(0, n) for a, n in enumerate(shape))
                    rows = ((k or 0) * shape[0], ((k or 0) + 1) * shape[0])
                    copies.append(Copy(key, region, path, index, block, form, shape, rows, i))
                    start += shape[axis]
    return tuple(copies)


def split(module: str) -> tuple[str, int | None]:
    """ "final_layer/modulation[1]" -> ("final_layer/modulation", 1)."""
    module, _, k = module.rstrip("]").partition("[")
    return module, int(k) if k else None


def foreign_shapes(copies: Iterable[Copy]) -> dict[str, Shape]:
    """Foreign key -> shape of every tensor of a plan."""
    # the last part of a joined tensor ends where the tensor ends
    return {copy.key: tuple(part.stop for part in copy.region) for copy in copies}


def grouped(copies: Iterable[Copy], field: str) -> dict[str, list[Copy]]:
    """The copies of each foreign key ("key") or of each of our leaves ("path"), in order."""
    groups: dict[str, list[Copy]] = {}
    for copy in copies:
        groups.setdefault(getattr(copy, field), []).append(copy)
    return groups


def tensors(copies: Iterable[Copy], leaves: Mapping[str, Any], dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Our leaves as (foreign key, contiguous array), made one at a time.

    `dtype` None keeps the tree's; where the parts of a joined tensor differ, the dtype that holds them all.
    """
    copies = tuple(copies)
    shapes = foreign_shapes(copies)
    for key, parts in grouped(copies, "key").items():
        tensor = np.empty(shapes[key], dtype or common(leaves[copy.path].dtype for copy in parts))
        for copy in parts:
            tensor[copy.region] = copy.to_torch(leaves[copy.path])
        yield key, tensor


def leaves(copies: Iterable[Copy], shapes: Mapping[str, Shape], get: Callable[[str], Any],
           dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Foreign tensors as (path, array) of our tree, made one at a time.

    Args:
      copies: the plan.
      shapes: our path -> shape.
      get: foreign key -> something with `dtype` that gives an array when sliced: an array, or a tensor still on disk.
      dtype: what to cast to; None keeps the stored one; where a leaf's tensors differ, the dtype that holds them all.
    """
    for path, parts in grouped(copies, "path").items():
        leaf = np.empty(shapes[path], dtype or common(get(copy.key).dtype for copy in parts))
        for copy in parts:
            leaf[copy.index] = copy.from_torch(get(copy.key)[copy.region])
        yield path, leaf


def common(dtypes: Iterable[Any]) -> np.dtype:
    """The dtype that holds them all."""
    return np.dtype(functools.reduce(jnp.promote_types, dtypes))


def _index(leaf: str, shape: Shape, i: int | None, k: int | None) -> tuple[tuple[int | slice, ...], Shape]:
    """Index and shape of layer i, feature slice k, of one of our leaves."""
    index = () if i is None else (i,)
    shape = shape[len(index):]
    if k is None:
        return index, shape
    inputs = 1 if leaf == "kernel" else 0  # a kernel's features come after its input axis
    return index + (slice(None),) * inputs + (k,), shape[:inputs] + shape[inputs + 1:]


def _torch(leaf: str, block: Shape, ours: str | Joined | Conv) -> tuple[str, Shape]:
    """Form and torch shape of a block."""
    if leaf != "kernel":
        return "plain", block if leaf == "embedding" else (math.prod(block),)
    if isinstance(ours, Conv) and not ours.pointwise:
        return "conv", (block[3], block[2], block[0], block[1])
    return "linear", (math.prod(block[1:]), block[0]) + (1, 1) * isinstance(ours, Conv)
