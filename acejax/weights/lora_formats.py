"""LoRA files of other programs: every format is a spelling of module names, over the tables of `keymaps`.

Formats (A [r, in], B [out, r]; names on the left stand for BFL's or diffusers' modules):

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha     ComfyUI, kohya
    transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight             diffusers, PEFT, ai-toolkit
    double_blocks.0.img_attn.qkv.lora_A.weight, .lora_B.weight                           BFL
    model.double_blocks.0.img_attn.qkv.lora_A.0_SwiftLoRA.weight                         swift, scepter

`lora_pairs` turns their pairs into ours and back.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import keymaps, lora_pairs, pickles, trees
from acejax.weights.layout import grouped
from acejax.weights.lora_pairs import Pair, Params
from acejax.weights.save import save_tensors
from acejax.weights.source import FLOATS, NAMES, PICKLES, Source, open_source, shown

PREFIXES = (*keymaps.PREFIXES, "diffusion_model.", "transformer.", "base_model.model.", "base_model.model.transformer.")
UNDERSCORED = ("lora_unet_", "lora_transformer_")  # kohya and ComfyUI; OneTrainer: dots become underscores
KEY = re.compile(r"(?P<module>.+?)\.(?:lora_(?P<role>A|B|down|up)(?:\.(?!weight$)[^.]+)?\.weight|(?P<alpha>alpha))")
REFUSED = ((r"\.lora_B(\.[^.]+)?\.bias$", "a LoRA bias"), (r"lora_magnitude_vector|dora_scale", "a DoRA magnitude"),
           (r"\.(hada|lokr|lora_mid|diff|diff_b)(_|\.|$)", "LyCORIS, not plain LoRA"),
           (r"norm[^.]*\.(scale|weight)$", "a whole norm scale"), (r"^(lora_te|text_encoder)", "a text encoder's LoRA"))
METADATA = "lora_adapter_metadata"  # diffusers' key of a PEFT configuration as JSON
LAYOUTS = {"comfy": "bfl", "diffusers": "diffusers"}  # what we write -> whose modules it names
LONGEST = 1000  # characters of a key that REFUSED looks at: no name is longer, and its expressions are quadratic


@dataclasses.dataclass(frozen=True)
class Found:
    """What a LoRA file holds, every tensor accounted for and checked.

    Attributes:
      layout: whose modules it names, "bfl" or "diffusers".
      tensors: by their keys in the file.
      roles: key of the adapted weight -> "down", "up" and, where it is there, "alpha" -> key in the file.
      pairs: key of the adapted weight -> its pair.
    """

    layout: str
    tensors: Mapping[str, np.ndarray]
    roles: Mapping[str, Mapping[str, str]]
    pairs: Mapping[str, Pair]


@dataclasses.dataclass(frozen=True)
class Made:
    """A tensor to be written.

    Attributes:
      weight, role: the key of the adapted weight; "down", "up" or "alpha".
      key: in the file.
      exact: its numbers as the LoRA has them.
      stored: the same in the dtype to store.
    """

    weight: str
    role: str
    key: str
    exact: np.ndarray
    stored: np.ndarray

    @property
    def held(self) -> bool:
        """Whether no finite number lies beyond the dtype."""
        return bool(np.isfinite(self.stored).all() or not np.isfinite(self.exact).all())


def load_lora(path: str | os.PathLike, config: MMDiTConfig, scale: float = 1.0, *, dtype: Any = None) -> Params:
    """Read a LoRA file of any of the formats above, as `acejax.apply` and `acejax.merge_lora` take it.

    Args:
      path: a safetensors file, or what PyTorch saved (.bin, .pt, .pth, .ckpt: needs PyTorch, and runs no code).
      config: the model that the LoRA is for.
      scale: strength, on top of the file's own alpha / rank. alpha comes from `.alpha` tensors, else from the file's
        PEFT metadata, else from an `adapter_config.json` beside a PEFT or swift file; else alpha is the rank.
      dtype: of the factors; None keeps the stored one.

    Returns:
      The tree described in `acejax.adapt.lora`; layers that the file leaves out have scale 0.

    Raises:
      UserError: no such file, another format, a key that is no LoRA of this model, half a pair, wrong shapes (as of
        another base model), numbers that are not finite.
    """
    found = read_lora(path, config)
    leaves = lora_pairs.from_foreign(config, found.layout, found.pairs, scale)
    import jax.numpy as jnp

    return trees.nested({name: jnp.asarray(leaf, None if name.endswith("/scale") else dtype)
                         for name, leaf in leaves.items()})


def save_lora(path: str | os.PathLike, config: MMDiTConfig, lora: Params, layout: str = "comfy",
              dtype: Any = None) -> None:
    """Write a LoRA for other programs; what `load_lora` read comes out as it was, bit for bit.

    "comfy": `lora_unet_*` with alpha = scale rank per module, for ComfyUI, kohya's scripts and diffusers. "diffusers":
    its split modules, for `FluxPipeline.load_lora_weights` and `FluxTransformer2DModel.load_lora_adapter`; ranks and
    alphas stand in the file's metadata. Where the ranks of one module differ in scale (several LoRAs in one, by other
    strengths), the differences are multiplied into B, rounded to its dtype.

    Args:
      path: a local file; its folder is made where it is absent.
      config: the model of `lora`.
      lora: as by `load_lora` or `acejax.adapt.lora`.
      layout: "comfy" or "diffusers".
      dtype: what to store; None stores the factors' own.

    Raises:
      ValueError: an unknown layout; a dtype that `load_lora` does not read, or that can't hold a number; a LoRA that is
        not the config's or holds nothing (scale 0 throughout).
    """
    made, metadata = export(config, lora, layout, dtype)
    for tensor in made:
        if not tensor.held:
            raise ValueError(f"{tensor.key!r} has numbers up to {np.abs(tensor.exact.astype(np.float64)).max():g}, "
                             f"beyond {NAMES[tensor.stored.dtype]}")
    save_tensors(path, {tensor.key: tensor.stored for tensor in made}, metadata)


def export(config: MMDiTConfig, lora: Params, layout: str, dtype: Any = None) -> tuple[list[Made], dict[str, str]]:
    """The tensors and the metadata that `save_lora` writes.

    Raises:
      ValueError: see `save_lora`, but for numbers that the dtype can't hold.
    """
    if dtype is not None and NAMES[np.dtype(dtype)] not in FLOATS:
        raise ValueError(f"dtype is {np.dtype(dtype).name}; a LoRA is stored as one of {', '.join(FLOATS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; known: {', '.join(LAYOUTS)}")
    made, ranks, alphas = [], {}, {}
    for key, (down, up, scale) in lora_pairs.to_foreign(config, LAYOUTS[layout], lora):
        name = key.removesuffix(".weight")
        a, b = ("lora_down", "lora_up") if layout == "comfy" else ("lora_A", "lora_B")
        foreign = UNDERSCORED[0] + name.replace(".", "_") if layout == "comfy" else f"transformer.{name}"
        ranks[name], alphas[name] = len(down), _alpha(scale[0], len(down))
        one = (scale == scale[0]).all()
        exact = up if one else up.astype(np.float64) * (scale.astype(np.float64) / float(scale[0]))
        made += [_made(key, "down", f"{foreign}.{a}.weight", down, np.dtype(dtype or down.dtype)),
                 _made(key, "up", f"{foreign}.{b}.weight", exact, np.dtype(dtype or up.dtype))]
        if layout == "comfy":
            made.append(_made(key, "alpha", f"{foreign}.alpha", np.array(alphas[name]), np.dtype(np.float32)))
            if _scale_of(made[-1].stored, len(down)) == scale[0]:  # what is read back is no other number
                made[-1] = dataclasses.replace(made[-1], exact=made[-1].stored)
    if not made:
        raise ValueError("this LoRA holds nothing: its scale is 0 throughout")
    return made, {} if layout == "comfy" else {METADATA: json.dumps(_peft(ranks, alphas))}


def read_lora(path: str | os.PathLike, config: MMDiTConfig) -> Found:
    """A LoRA file of any of the formats above, as pairs in its own layout.

    Raises:
      UserError: see `load_lora`.
    """
    path = pathlib.Path(path)
    opened = pickles.open_pickle(path) if path.suffix in PICKLES else open_source(path)
    for key, tensor in opened.tensors.items():
        if NAMES[tensor.dtype] not in FLOATS:
            raise UserError(f"{path}: {shown(key)} is stored as {NAMES[tensor.dtype]}; expected one of "
                            f"{', '.join(FLOATS)}")
    tensors = {key: np.array(tensor[...]) for key, tensor in opened.tensors.items()}
    layout, roles = _roles(path, tensors, config)
    adapter = _adapter(path, opened)
    pairs = {key: _pair(path, config, tensors, adapter, layout, key, parts) for key, parts in roles.items()}
    return Found(layout, tensors, roles, pairs)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a LoRA rather than a model."""
    return any(KEY.fullmatch(key) for key in keys)


def bfl_targets(config: MMDiTConfig, pattern: str) -> tuple[str, ...]:
    """Our modules for a regular expression over BFL's names, as ACE++'s TARGET_MODULES has one ("model." may lead).

    Raises:
      UserError: a pattern that matches nothing, or some layers of a stack only (a stack's layers train together).
    """
    hits: dict[str, set[bool]] = {}
    for copy in lora_pairs.kernels(config, "bfl"):
        names = (prefix + copy.key.removesuffix(".weight") for prefix in ("", "model."))
        hits.setdefault(lora_pairs.module_of(copy), set()).add(any(re.fullmatch(pattern, name) for name in names))
    partial = [module for module, found in hits.items() if len(found) > 1]
    if partial or not any(True in found for found in hits.values()):
        found = f"some layers of {partial[0]} only" if partial else "no module"
        raise UserError(f"target {pattern!r} matches {found}; expected BFL module names, all layers of a stack alike")
    return tuple(module for module, found in hits.items() if True in found)


@functools.lru_cache(maxsize=8)
def _names(config: MMDiTConfig) -> Mapping[str, tuple[str, str]]:
    """Every spelling of a module -> (layout, the key of its weight)."""
    names = {}
    for layout in keymaps.LAYOUTS:
        for key in grouped(lora_pairs.kernels(config, layout), "key"):
            module = key.removesuffix(".weight")
            spellings = [prefix + module for prefix in PREFIXES]
            spellings += [prefix + module.replace(".", "_") for prefix in UNDERSCORED]
            names |= dict.fromkeys(spellings, (layout, key))
    return names


def _made(weight: str, role: str, key: str, exact: np.ndarray, dtype: np.dtype) -> Made:
    with np.errstate(over="ignore"):  # `held` tells
        stored = np.require(exact, dtype, "C")
    return Made(weight, role, key, stored if exact.dtype == dtype else exact, stored)


def _scale_of(alpha: float | np.floating, rank: float) -> np.float32:
    """alpha / rank; infinite or 0 where float32 has no such number."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(float(alpha) / rank)


def _alpha(scale: np.float32, rank: int) -> float:
    """scale rank, as the plainest number that gives `scale` back, as float32 too: 4.0 for 0.6666667 of 6."""
    exact = float(scale) * rank
    plain = float(f"{exact:.6g}")
    with np.errstate(over="ignore"):
        both = plain, np.float32(plain)
    return plain if all(_scale_of(alpha, rank) == scale for alpha in both) else exact


def _peft(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """PEFT's configuration of a LoRA, under the prefix by which diffusers finds it."""
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    fields = {"r": rank, "lora_alpha": alpha, "target_modules": list(ranks),
              # ^: PEFT would take "proj_out" for the end of a block's name too
              "rank_pattern": {f"^{name}": found for name, found in ranks.items() if found != rank},
              "alpha_pattern": {f"^{name}": found for name, found in alphas.items() if found != alpha}}
    return {f"transformer.{name}": value for name, value in fields.items()}


def _roles(path: pathlib.Path, keys: Iterable[str], config: MMDiTConfig) -> tuple[str, dict[str, dict[str, str]]]:
    """(layout, key of the adapted weight -> role -> key in the file), every key of the file accounted for."""
    names, found = _names(config), {}  # (layout, key of the weight) -> role -> key in the file
    for key in keys:
        match = KEY.fullmatch(key)
        module = names.get(match["module"]) if match else None
        if module is None:
            named = (what for pattern, what in REFUSED if re.search(pattern, key[:LONGEST]))
            what = next(named, "no LoRA of this model")
            raise UserError(f"{path}: {shown(key)} is {what}; expected pairs of lora_A and lora_B, or lora_down and "
                            "lora_up, for FLUX's linear layers in BFL's or diffusers' names")
        role = match["alpha"] or {"A": "down", "B": "up"}.get(match["role"], match["role"])
        other = found.setdefault(module, {}).setdefault(role, key)
        if other != key:
            raise UserError(f"{path}: {shown(key)} and {shown(other)} are the same factor; expected one LoRA per file")
    if not found:
        raise UserError(f"{path}: found no tensors; expected a LoRA")
    if len({layout for layout, _ in found}) > 1:
        some = {layout: next(iter(roles.values())) for (layout, _), roles in found.items()}
        raise UserError(f"{path}: {shown(some['bfl'])} is a name of BFL's, {shown(some['diffusers'])} one of "
                        "diffusers'; expected one layout per file")
    return next(iter(found))[0], {key: roles for (_, key), roles in found.items()}


def _pair(path: str | os.PathLike, config: MMDiTConfig, tensors: Mapping[str, np.ndarray],
          adapter: Mapping[str, Any], layout: str, key: str, roles: Mapping[str, str]) -> Pair:
    """One module's pair, checked; `roles`: down, up, alpha -> key in the file."""
    for role in ("down", "up"):
        if role not in roles:
            lone = roles.get("up", roles.get("down", roles.get("alpha")))
            raise UserError(f"{path}: {shown(lone)} stands alone; expected the module's {role} factor "
                            f"({'lora_A or lora_down' if role == 'down' else 'lora_B or lora_up'}) too")
        with np.errstate(over="ignore"):  # of float64: JAX computes in float32
            finite = np.isfinite(tensors[roles[role]].astype(np.float32)).all()
        if not finite:
            raise UserError(f"{path}: {shown(roles[role])} has numbers that are not finite (as float32, if they are "
                            "F64); expected finite ones")
    outputs, inputs = keymaps.expected(config, layout)[key]
    down, up = tensors[roles["down"]], tensors[roles["up"]]
    rank = down.shape[0] if down.ndim == 2 else 0
    for role, shape, wanted in (("down", down.shape, (rank or "rank", inputs)), ("up", up.shape, (outputs, rank))):
        if shape != wanted or not rank:
            raise UserError(f"{path}: {shown(roles[role])} has shape {shape}; expected {wanted} for a layer of "
                            f"{inputs} inputs and {outputs} outputs")
    return down, up, np.full(rank, _scale(path, tensors, adapter, key.removesuffix(".weight"), roles, rank))


def _scale(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], adapter: Mapping[str, Any], module: str,
           roles: Mapping[str, str], rank: int) -> np.float32:
    """alpha / rank of one module; without an alpha, or with kohya's alpha of 0, it is 1."""
    if "alpha" in roles:
        alpha, where = tensors[roles["alpha"]], roles["alpha"]
        alpha = float(alpha.ravel()[0]) if alpha.size == 1 else math.nan
    else:
        patterns = adapter.get("alpha_pattern") or {}
        # PEFT takes regular expressions here; diffusers writes names, and a file's regexes are not for us to run
        hits = [value for name, value in patterns.items() if f"^.{module}".endswith(f".{name}".replace(".^", "^."))]
        alpha, where = (hits[0], "alpha_pattern") if hits else (adapter.get("lora_alpha"), "lora_alpha")
    if alpha is None or alpha == 0:
        return np.float32(1)
    scale = np.float32(np.nan)
    if isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < sys.float_info.max:
        scale = _scale_of(alpha, math.sqrt(rank) if adapter.get("use_rslora") and "alpha" not in roles else rank)
    if not np.isfinite(scale) or not scale:
        raise UserError(f"{path}: alpha {shown(where)} of {module!r} is {shown(alpha)}; expected one finite number, "
                        "alpha / rank neither 0 nor infinite in float32")
    return scale


def _adapter(path: pathlib.Path, opened: Source) -> Mapping[str, Any]:
    """PEFT's configuration of a file in its names, without prefix: from the metadata, else from beside the file."""
    beside = opened.path.with_name("adapter_config.json")  # `path` may be the folder of both
    if not any(".lora_A." in key for key in opened.tensors):
        return {}
    where, text = f"metadata {METADATA!r}", opened.metadata.get(METADATA)
    try:
        if text is None and beside.is_file():
            where, text = beside.name, beside.read_text(errors="replace")
        fields = json.loads(text or "{}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {where} is no JSON ({error}); expected a PEFT configuration") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: {where} is {type(fields).__name__}; expected a PEFT configuration")
    fields = {name.removeprefix("transformer."): value for name, value in fields.items()}
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", name) for name in patterns):
        raise UserError(f"{path}: alpha_pattern in {where} is {shown(patterns)}; expected numbers by module name")
    return fields
