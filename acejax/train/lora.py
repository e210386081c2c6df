"""What a run that trains a LoRA trains, and what stays as it is: the factors, their scales, the base model beside them.

The frozen part of a run is one tree: `params` and, of a quantised base, `quant`, as `acejax.apply` takes them, and
`scales` (`acejax.adapt.lora.tie`). Checkpoints have nothing of it: it is read anew when a run goes on.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from acejax.adapt import lora as adapt
from acejax.adapt import quantize
from acejax.adapt.targets import ACE_PLUS, select, stacked
from acejax.errors import UserError
from acejax.model import mmdit
from acejax.model.config import MMDiTConfig
from acejax.train.config import LoraConfig
from acejax.weights import lora_formats, lora_pairs, trees

Params = dict[str, Any]
Leaves = dict[str, Any]  # by path


def check(config: LoraConfig, model: MMDiTConfig) -> None:
    """What can be wrong with a run's LoRA; a file to begin with is read.

    Raises:
      UserError: a rank beyond the model's width, targets that match nothing, a file of another rank or model.
    """
    if config.rank > model.hidden_size:
        raise UserError(f"config.lora.rank is {config.rank}; expected 1 to {model.hidden_size}, the model's width")
    targets(config, model)
    if config.init_from:
        _read(config, model)


def targets(config: LoraConfig, model: MMDiTConfig) -> tuple[str, ...]:
    """The modules that are adapted, in our names.

    Raises:
      UserError: a pattern that is none, or that matches neither our names nor BFL's.
    """
    params, chosen = _shapes(model), set()
    for pattern in (config.targets,) if isinstance(config.targets, str) else config.targets:
        try:
            chosen.update(select(params, pattern))
        except UserError as ours:
            try:
                chosen.update(lora_formats.bfl_targets(model, pattern))
            except (UserError, re.error) as theirs:
                raise UserError(f"config.lora.targets: {theirs if 'some layers' in str(theirs) else ours}") from None
    return tuple(module for module in select(params, ".*") if module in chosen)


def factors(config: LoraConfig, model: MMDiTConfig, seed: int) -> tuple[Params, Params]:
    """What to train and its scales, as `acejax.adapt.lora.tie` has them: of a file, or of a LoRA that does nothing yet.

    What `config.init_from` adapts goes on from there; what it leaves out of the targets begins anew. Shapes are all
    that is made under `jax.eval_shape`, of a file too.

    Raises:
      UserError: as `check`.
    """
    fresh = adapt.init(model, jax.random.key(seed), config.rank, config.alpha, targets(config, model))
    if not config.init_from:
        return adapt.tie(fresh)
    leaves = trees.flat(_read(config, model))
    known = {path.rpartition("/")[0] for path in leaves}
    leaves |= {path: leaf for path, leaf in trees.flat(fresh).items() if path.rpartition("/")[0] not in known}
    return adapt.tie(trees.nested(leaves))


def shapes(config: LoraConfig, model: MMDiTConfig) -> tuple[Params, Params]:
    """Factors and scales of a fresh LoRA, as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: factors(dataclasses.replace(config, init_from=None), model, 0))


def base_shapes(config: LoraConfig, model: MMDiTConfig) -> Params:
    """The base as ShapeDtypeStructs: `{"params"[, "quant"]}`."""
    def build(params: Params) -> Params:
        return split({path: leaf for name, kernel in flatten_dict(params, sep="/").items()
                      for path, leaf in hold(config, model)(name, kernel.astype(held_dtype(config))).items()})
    return jax.eval_shape(build, _shapes(model))


def held_dtype(config: LoraConfig) -> Any:
    """What the base's numbers are, but for quantised kernels."""
    return jnp.dtype(jnp.bfloat16 if config.base in quantize.KINDS else config.base)


def hold(config: LoraConfig, model: MMDiTConfig) -> Callable[[str, jax.Array], Leaves]:
    """(path, leaf) of the base -> what is held in its place, by path: the leaf, or its numbers in eight bits."""
    eight = config.base in quantize.KINDS
    quantised = {f"{module}/kernel" for module in select(_shapes(model), ACE_PLUS)} if eight else ()

    def place(path: str, leaf: jax.Array) -> Leaves:
        if path not in quantised:
            return {path: leaf}
        module = path.removesuffix("/kernel")
        q, scale = quantize.quantize_kernel(leaf, config.base, inputs=int(stacked(module)))
        return {f"{module}/q": q, f"{module}/scale": scale}

    return place


def split(leaves: Leaves) -> Params:
    """Leaves by path, quantised and not -> `{"params"[, "quant"]}`."""
    eight = {f"{path.removesuffix('/q')}/{name}" for path in leaves if path.endswith("/q") for name in ("q", "scale")}
    parts = {"params": leaves.keys() - eight, "quant": eight}
    return {name: unflatten_dict({path: leaves[path] for path in sorted(paths)}, sep="/")
            for name, paths in parts.items() if paths}


def pairs(config: LoraConfig, model: MMDiTConfig) -> dict[str, int]:
    """Numbers of the factors that each module uses, shared ones too, as `acejax.model.flops.low_rank` counts."""
    leaves = flatten_dict(jax.eval_shape(adapt.spread, *shapes(config, model)), sep="/")
    return {path.removesuffix("/a"): leaf.size + leaves[f"{path.removesuffix('/a')}/b"].size
            for path, leaf in leaves.items() if path.endswith("/a")}


@functools.lru_cache(maxsize=8)
def _shapes(model: MMDiTConfig) -> Params:
    return jax.eval_shape(functools.partial(mmdit.init, model), jax.random.key(0))


def _read(config: LoraConfig, model: MMDiTConfig) -> Params:
    """A LoRA file as a tree of numpy arrays, factors in float32."""
    found = lora_formats.read_lora(config.init_from, model)
    ranks = sorted({len(down) for down, _, _ in found.pairs.values()})
    if ranks != [config.rank]:
        raise UserError(f"{config.init_from}: found rank {', '.join(map(str, ranks))}; config.lora.rank is "
                        f"{config.rank}")
    leaves = lora_pairs.from_foreign(model, found.layout, found.pairs)
    modules = {path.rpartition("/")[0] for path in leaves}
    if others := sorted(modules - set(targets(config, model))):
        raise UserError(f"{config.init_from}: adapts {others[0]}; config.lora.targets, {config.targets!r}, does not")
    return trees.nested({path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()})
