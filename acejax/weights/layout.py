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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

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
      ignored: keys, after any prefix, that some files hold and no model needs.
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

    def locate(self, found: Collection[str]) -> tuple[dict[str, str], list[str]] | None:
        """Where a file with the keys `found` keeps the table's tensors; None when it is not in this layout.

        Returns:
          Each key under the file's prefix, as the table names it -> as the file does; and the keys outside the prefix.
          Ignored keys are in neither, and of two twins one is left, under the name of the table.
        """
        marker = self.key(self.marker).format(i=0)
        prefix = next((prefix for prefix in self.prefixes if prefix + marker in found), None)
        if prefix is None:
            return None
        kept = [key for key in found if not any(f".{key}".endswith(f".{name}") for name in self.ignored)]
        inside = {key.removeprefix(prefix): key for key in kept if key.startswith(prefix)}
        for twin, key in self.twins.items():
            if twin in inside:
                stored = inside.pop(twin)
                inside.setdefault(key, stored)
        return inside, [key for key in kept if not key.startswith(prefix)]


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


    def part(self, cut: Sequence[slice]) -> tuple["Copy", tuple[slice, ...]]:
        """The copy of a part of its block, narrowed as far as torch's axes go, and what is then left to slice.

        `cut` has a slice for each axis of the block.
        """
        cut, rest = tuple(cut), (slice(None),) * len(self.block)
        if self.form == "conv":
            kept = {0: cut[3], 1: cut[2], 2: cut[0], 3: cut[1]}
        elif self.form == "linear":  # several feature axes are one in torch, and are cut afterwards
            kept = {1: cut[0]} | ({0: cut[1]} if len(cut) == 2 else {})
            rest = rest if len(cut) == 2 else (slice(None), *cut[1:])
        elif len(cut) == len(self.region):
            kept = dict(enumerate(cut))
        else:
            return self, cut
        region = tuple(slice(at.start + kept[axis].start, at.start + kept[axis].stop) if axis in kept else at
                       for axis, at in enumerate(self.region))
        done = tuple(left == slice(None) for left in rest)
        block = tuple(one.stop - one.start if whole else size
                      for one, whole, size in zip(cut, done, self.block, strict=True))
        return dataclasses.replace(self, region=region, block=block), rest


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


def tensor(copies: Iterable[Copy], shape: Shape, leaves: Mapping[str, Any], dtype: Any,
           region: tuple[slice, ...] | None = None) -> np.ndarray:
    """One foreign tensor, or a region of it, from our leaves.

    Args:
      copies: those of its key.
      shape: of the whole tensor.
      leaves: our path -> array.
      dtype: of the result.
    """
    bounds = _bounds(shape, region)
    made = np.empty([stop - start for start, stop in bounds], dtype)
    for copy in copies:
        both = [(max(part.start, start), min(part.stop, stop))
                for part, (start, stop) in zip(copy.region, bounds, strict=True)]
        if all(first < last for first, last in both):
            into = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(both, bounds, strict=True))
            taken = tuple(slice(a - at.start, b - at.start) for (a, b), at in zip(both, copy.region, strict=True))
            made[into] = copy.to_torch(leaves[copy.path])[taken]
    return made


def leaf(copies: Iterable[Copy], shape: Shape, get: Callable[[str], Any], dtype: Any,
         region: tuple[slice, ...] | None = None) -> np.ndarray:
    """One of our leaves, or the part of it that one device holds.

    Args:
      copies: those of the leaf.
      shape: of the whole leaf.
      get: foreign key -> something that gives an array when sliced: an array, or a tensor still on disk.
      dtype: of the result.
      region: the part, as slices over `shape`; None for all. Of a weight, only the rows and columns of the part are
        asked for.
    """
    bounds = _bounds(shape, region)
    made = np.empty([stop - start for start, stop in bounds], dtype)
    for copy in copies:
        into, out_of = [], []  # where the block goes in the part, and which of its own axes' elements go there
        for axis, (start, stop) in enumerate(bounds):
            at = copy.index[axis] if axis < len(copy.index) else slice(None)
            if isinstance(at, int):
                if not start <= at < stop:
                    break
                into.append(at - start)
            else:
                into.append(slice(None))
                out_of.append(slice(start, stop))
        else:
            narrow, rest = copy.part(out_of)
            made[tuple(into)] = narrow.from_torch(get(copy.key)[narrow.region])[rest]
    return made


def _bounds(shape: Shape, region: tuple[slice, ...] | None) -> list[tuple[int, int]]:
    """Start and stop along each axis."""
    region = (slice(None),) * len(shape) if region is None else region
    return [part.indices(size)[:2] for part, size in zip(region, shape, strict=True)]


def dtype_of(copies: Iterable[Copy], get: Callable[[str], Any]) -> np.dtype:
    """The dtype that holds all foreign tensors of a leaf."""
    return common(get(copy.key).dtype for copy in copies)


def common(dtypes: Iterable[Any]) -> np.dtype:
    """The dtype that holds them all."""
    kinds = sorted({np.dtype(dtype) for dtype in dtypes}, key=str)
    if len(kinds) == 1:
        return kinds[0]
    import jax.numpy as jnp  # numpy alone knows no common dtype of the short floats

    return np.dtype(functools.reduce(jnp.promote_types, kinds))


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


@dataclasses.dataclass(frozen=True)
class Piece:
    """One layout's `source[taken]` and another's `target[given]` hold the same numbers in the same order."""

    source: str
    taken: tuple[slice, ...]
    target: str
    given: tuple[slice, ...]


def meet(here: Iterable[Copy], there: Iterable[Copy]) -> dict[str, list[Piece]]:
    """From one layout's plan to another's of the same model: target key -> the pieces that fill it, in order of rows.

    Neighbours in both tensors become one piece, so that a tensor which both layouts store alike is copied whole.
    """
    held: dict[tuple[str, int | None], list[Copy]] = {}
    for copy in here:
        held.setdefault((copy.path, copy.layer), []).append(copy)
    pieces: dict[str, list[Piece]] = {}
    for wanted in there:
        for copy in held[wanted.path, wanted.layer]:
            start, stop = max(copy.rows[0], wanted.rows[0]), min(copy.rows[1], wanted.rows[1])
            if start < stop:
                piece = Piece(copy.key, _part(copy, start, stop), wanted.key, _part(wanted, start, stop))
                pieces.setdefault(wanted.key, []).append(piece)
    return {key: _merged(sorted(parts, key=lambda piece: [part.start for part in piece.given]))
            for key, parts in pieces.items()}


def _part(copy: Copy, start: int, stop: int) -> tuple[slice, ...]:
    """The region of a copy that holds these rows of the leaf's torch form."""
    first = copy.region[0].start + start - copy.rows[0]
    return (slice(first, first + stop - start), *copy.region[1:])


def _merged(pieces: list[Piece]) -> list[Piece]:
    merged = pieces[:1]
    for piece in pieces[1:]:
        last = merged[-1]
        axis = _shared_edge(last, piece)
        if axis is None:
            merged.append(piece)
        else:
            merged[-1] = Piece(last.source, _extended(last.taken, piece.taken, axis), last.target,
                               _extended(last.given, piece.given, axis))
    return merged


def _shared_edge(first: Piece, second: Piece) -> int | None:
    """The axis along which `second` goes on where `first` ends, in both tensors."""
    if first.source != second.source or len(first.taken) != len(first.given):
        return None
    both = list(zip(first.taken + first.given, second.taken + second.given, strict=True))
    differ = {i % len(first.taken) for i, (a, b) in enumerate(both) if a != b}
    if len(differ) != 1:
        return None
    (axis,) = differ
    adjoin = all(a.stop == b.start for i, (a, b) in enumerate(both) if i % len(first.taken) == axis)
    return axis if adjoin else None


def _extended(first: tuple[slice, ...], second: tuple[slice, ...], axis: int) -> tuple[slice, ...]:
    return (*first[:axis], slice(first[axis].start, second[axis].stop), *first[axis + 1:])
