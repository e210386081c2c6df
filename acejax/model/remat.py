"""What the backward pass finds saved and what it recomputes: one table of the activations that have a name.

A block always saves its input. `Execution.remat` says what else: "full" nothing, "none" everything that differentiation
asks for, or names of `TABLE` with commas between ("attention,mlp"). A name with ":host" behind it is saved in the
host's memory ("attention,mlp:host"): it travels there in the forward pass and back in the backward pass. The names are
set in `acejax.model.mmdit`, `acejax.model.joint` and `acejax.model.tpu.attention`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from acejax.model.config import MMDiTConfig

FULL, NONE = "full", "none"
HOST, PINNED = ":host", "pinned_host"  # behind a name; jax's name of the memory that devices copy from by themselves
ATTENTION, QKV, MLP, PROJ, OUT = "attention", "qkv", "mlp", "proj", "out"
Pair = tuple[float, float]  # of a double block and of a single block


@dataclasses.dataclass(frozen=True)
class Activation:
    """A named activation of a block.

    Attributes:
      what: it is.
      values: of a token, `f(config)`, in a double block (a token is of one of its streams) and in a single block.
      flops: of a token that recomputing it costs, `f(config, tokens of a sample)`, likewise: the product that makes it,
        as what goes into that is there again anyway.
      split: whether it lies over the mesh's `tensor` axis.
    """

    what: str
    values: "Callable[[MMDiTConfig], Pair]"
    flops: "Callable[[MMDiTConfig, int], Pair]"
    split: bool = True


TABLE = {
    ATTENTION: Activation(
        "what attention gives, with what its kernel needs beside it: a number a head, which is not counted",
        lambda c: (c.hidden_size, c.hidden_size),
        lambda c, tokens: (4 * tokens * c.hidden_size, 4 * tokens * c.hidden_size)),
    QKV: Activation(
        "queries, keys and values as they come from their product",
        lambda c: (3 * c.hidden_size, 3 * c.hidden_size),
        lambda c, tokens: (6 * c.hidden_size**2, 6 * c.hidden_size**2)),
    MLP: Activation(
        "the MLP's hidden layer, before its gelu",
        lambda c: (c.mlp_size, c.mlp_size),
        lambda c, tokens: (2 * c.hidden_size * c.mlp_size, 2 * c.hidden_size * c.mlp_size)),
    PROJ: Activation(
        "attention's projection in a double block, from which the MLP's input is made",
        lambda c: (c.hidden_size, 0),
        lambda c, tokens: (2 * c.hidden_size**2, 0), split=False),
    OUT: Activation(
        # Only the gates' gradient needs it: where a LoRA trains no modulation, nothing is saved, nothing recomputed.
        "what a block's last gate multiplies: the MLP's output, in a single block with attention's projection",
        lambda c: (c.hidden_size, c.hidden_size),
        lambda c, tokens: (2 * c.hidden_size * c.mlp_size, 2 * c.hidden_size * (c.mlp_size + c.hidden_size)),
        split=False),
}
# Values of a token, in hidden_size, that "none" saves: of the residual stream, and of heads and MLP over `tensor`.
# Counted in what XLA for a CPU holds of the 12B step.
EVERYTHING = {False: (16, 9), True: (38, 37)}


def places(remat: str) -> dict[str, bool]:
    """The named activations that a setting saves, in the table's order, with whether in the host's memory; of "none"
    every one, on the device.

    Raises:
      ValueError: it is none, or a name is there twice.
    """
    if remat == NONE:
        return dict.fromkeys(TABLE, False)
    found: dict[str, bool] = {}
    for part in [] if remat == FULL else remat.split(","):
        name = part.strip().removesuffix(HOST)
        if name not in TABLE:
            raise ValueError(f"{part.strip()!r} is none of {', '.join(TABLE)}, nor one of them with {HOST!r}")
        if found.setdefault(name, part.strip().endswith(HOST)) != part.strip().endswith(HOST):
            raise ValueError(f"{name!r} is there with and without {HOST!r}")
    return {name: found[name] for name in TABLE if name in found}


def names(remat: str) -> tuple[str, ...]:
    """The named activations that a setting saves, wherever; errors as of `places`."""
    return tuple(places(remat))


def on_host(remat: str) -> tuple[str, ...]:
    """Those of them that it saves in the host's memory."""
    return tuple(name for name, host in places(remat).items() if host)


def setting(saved: Iterable[str]) -> str:
    """The setting that saves these on the device, and no others."""
    saved = set(saved)
    return ",".join(name for name in TABLE if name in saved) or FULL


def settings() -> tuple[str, ...]:
    """Each set of names, from "full" to all of them, on the device.

    Not "none": all names leave no product of a block but modulation's to be done again, with a fifth of its memory.
    """
    sets = (chosen for count in range(len(TABLE) + 1) for chosen in itertools.combinations(TABLE, count))
    return tuple(map(setting, sets))


def values(config: "MMDiTConfig", remat: str, host: bool = False) -> dict[bool, Pair]:
    """Values of a token that a double and a single block save beside their input, by `Activation.split`: on the device,
    or in the host's memory."""
    if remat == NONE and not host:  # with the input
        return {split: tuple(config.hidden_size * (count - (not split)) for count in pair)
                for split, pair in EVERYTHING.items()}
    saved = [TABLE[name] for name, there in places(remat).items() if there is host]
    return {split: _total(one.values(config) for one in saved if one.split is split) for split in (False, True)}


def flops(config: "MMDiTConfig", remat: str, tokens: int) -> float:
    """FLOPs of a forward pass over one sample of so many tokens, text and image, that are not done again."""
    double, single = _total(TABLE[name].flops(config, tokens) for name in names(remat))
    return tokens * (config.depth * double + config.depth_single_blocks * single)


def _total(pairs: Iterable[Pair]) -> Pair:
    doubles, singles = zip((0, 0), *pairs, strict=True)
    return sum(doubles), sum(singles)
