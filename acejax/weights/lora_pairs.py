"""LoRA pairs of foreign modules and of ours, turned into each other over the tables of `keymaps`.

A foreign module may be several of ours (`linear1`), a slice of one (`to_q`) or all of it; `join` serves every case, in
both directions. Numbers are moved, never multiplied: what comes in can go out as it was.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from acejax.model.config import MMDiTConfig
from acejax.weights import keymaps, trees
from acejax.weights.layout import Copy, common, grouped

Params = dict[str, Any]
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # down [r, in], up [out, r], scale [r] float32


@dataclasses.dataclass(frozen=True)
class Part:
    """The pair up [rows, r] diag(scale [r]) down [r, columns] that makes these rows and columns of a weight."""

    rows: slice
    columns: slice
    down: np.ndarray
    up: np.ndarray
    scale: np.ndarray


@functools.lru_cache(maxsize=8)
def kernels(config: MMDiTConfig, layout: str) -> tuple[Copy, ...]:
    """Which linear layer of a layout is which of ours."""
    return tuple(copy for copy in keymaps.plan_for(config, layout) if copy.path.endswith("/kernel"))


def module_of(copy: Copy) -> str:
    return copy.path.removesuffix("/kernel")


def from_foreign(config: MMDiTConfig, layout: str, pairs: Mapping[str, Pair], strength: float = 1.0
                 ) -> dict[str, np.ndarray]:
    """Pairs by the key of the weight they adapt -> a, b and scale by our path; layers without a pair get scale 0."""
    shapes, ours = keymaps.leaf_shapes(config), {}
    for path, copies in grouped(kernels(config, layout), "path").items():
        if any(copy.key in pairs for copy in copies):
            module = module_of(copies[0])
            ours |= {f"{module}/{name}": leaf for name, leaf in _leaf(copies, pairs, shapes[path], strength).items()}
    return ours


def to_foreign(config: MMDiTConfig, layout: str, lora: Params) -> Iterator[tuple[str, Pair]]:
    """Our tree -> (key of the adapted weight, its pair), made one at a time; ranks of scale 0 are left out.

    Raises:
      ValueError: a LoRA for a layer that the config does not have.
    """
    ours = {name: np.asarray(leaf) for name, leaf in trees.flat(lora).items()}
    copies, shapes = kernels(config, layout), keymaps.expected(config, layout)
    unknown = sorted({name.rpartition("/")[0] for name in ours} - {module_of(copy) for copy in copies})
    if unknown:
        raise ValueError(f"lora has {unknown[0]!r}, which is no linear layer of the model")
    for key, group in grouped(copies, "key").items():
        parts = [part for copy in group if f"{module_of(copy)}/a" in ours for part in _parts(copy, ours)]
        if any(len(part.scale) for part in parts):
            down, up, scale = join(parts, shapes[key])
            yield key, (down, up, scale[:, 0])


def adds_the_same(config: MMDiTConfig, layout: str, one: Params, other: Params) -> dict[str, bool]:
    """Key of a weight of a layout -> whether two trees of ours add the same to it, bit for bit.

    Ranks that add nothing do not count: a file of another layout needs them where its modules share one A.
    """
    first, second = trees.flat(one), trees.flat(other)
    return {key: all(np.array_equal(mine, theirs) for copy in copies
                     for mine, theirs in zip(_added(copy, first), _added(copy, second), strict=True))
            for key, copies in grouped(kernels(config, layout), "key").items()}


def join(parts: Sequence[Part], shape: tuple[int, int], slices: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(down [r, in], up [out, r], scale [r, slices]) of a whole weight [out, in] from those of its parts.

    Parts that have the same factor where they could share one (side by side along out: down; along in: up) share their
    ranks; others get ranks of their own, zeros elsewhere: the product is the same either way. scale is 0 in the slices
    of `out` that a rank does not serve.
    """
    sharing = "down" if len({part.columns.start for part in parts}) == 1 else "up"
    groups: dict[tuple, list[Part]] = {}
    for part in parts:
        factor = getattr(part, sharing)
        groups.setdefault((factor.tobytes(), factor.shape, part.scale.tobytes()), []).append(part)
    rank = sum(len(members[0].scale) for members in groups.values())
    down = np.zeros((rank, shape[1]), common(part.down.dtype for part in parts))
    up = np.zeros((shape[0], rank), common(part.up.dtype for part in parts))
    scale = np.zeros((rank, slices), np.float32)
    size, start = shape[0] // slices, 0
    for members in groups.values():
        at = slice(start, start := start + len(members[0].scale))
        for part in members:
            down[at, part.columns] = part.down
            up[part.rows, at] = part.up
            scale[at, part.rows.start // size:-(-part.rows.stop // size)] = part.scale[:, None]
    return down, up, scale


def _leaf(copies: Iterable[Copy], pairs: Mapping[str, Pair], shape: tuple[int, ...], strength: float
          ) -> dict[str, np.ndarray]:
    """a, b and scale of one of our modules (`shape`: of its kernel, stacked or not), from the file's pairs."""
    copies, made = tuple(copies), {}
    lone = copies[0].layer is None
    inputs, *features = shape if lone else shape[1:]
    outputs = math.prod(features)
    slices = outputs // copies[0].shape[0]
    for layer, group in _by_layer(copies).items():
        parts = []
        for copy in group:
            if copy.key in pairs:
                (rows, columns), (down, up, scale) = copy.region, pairs[copy.key]
                parts.append(Part(slice(*copy.rows), slice(0, inputs), down[:, columns], up[rows],
                                  np.float32(scale * strength)))
        if parts:
            made[layer] = join(parts, (outputs, inputs), slices)
    rank = max(len(down) for down, _, _ in made.values())
    layers = 1 if lone else shape[0]
    a = np.zeros((layers, inputs, rank), common(down.dtype for down, _, _ in made.values()))
    b = np.zeros((layers, rank, outputs), common(up.dtype for _, up, _ in made.values()))
    scales = np.zeros((layers, rank, slices), np.float32)
    for layer, (down, up, scale) in made.items():
        at = layer or 0
        a[at, :, :len(down)], b[at, :len(down)], scales[at, :len(down)] = down.T, up.T, scale
    leaves = {"a": a, "b": b.reshape(layers, rank, *features), "scale": scales}
    return {name: leaf[0] for name, leaf in leaves.items()} if lone else leaves


def _by_layer(copies: Iterable[Copy]) -> dict[int | None, list[Copy]]:
    layers: dict[int | None, list[Copy]] = {}
    for copy in copies:
        layers.setdefault(copy.layer, []).append(copy)
    return layers


def _leaves(copy: Copy, ours: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a [in, r], b [r, out] and scale [r, slices] of the layer that a copy is of."""
    a, b, scale = (leaf if copy.layer is None else leaf[copy.layer]
                   for leaf in (ours[f"{module_of(copy)}/{name}"] for name in ("a", "b", "scale")))
    return a, b.reshape(len(b), -1), scale


def _added(copy: Copy, ours: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What a copy covers of our pair, with the scale in b: a [in, r] and b [r, rows], of the ranks that add anything.

    Float64 holds the product of a float32 scale and a number of b exactly.
    """
    if f"{module_of(copy)}/a" not in ours:
        return np.zeros((copy.shape[1], 0)), np.zeros((0, copy.shape[0]))
    a, b, scale = _leaves(copy, ours)
    rows = slice(*copy.rows)
    scaled = b[:, rows].astype(np.float64) * np.repeat(scale, b.shape[1] // scale.shape[1], axis=1)[:, rows]
    there = a.any(0) & scaled.any(1)
    return a[:, there], scaled[there]


def _parts(copy: Copy, ours: Mapping[str, np.ndarray]) -> Iterable[Part]:
    """What a copy covers of our pair, by slices of one scale; ranks that are not there (scale 0) left out."""
    a, b, scale = _leaves(copy, ours)
    size = b.shape[1] // scale.shape[1]
    rows, columns = copy.region
    for i, one in enumerate(scale.T):
        start, stop = max(copy.rows[0], i * size), min(copy.rows[1], (i + 1) * size)
        if start < stop:
            there, shift = one != 0, rows.start - copy.rows[0]
            yield Part(slice(start + shift, stop + shift), columns, a.T[there], b[there, start:stop].T, one[there])
