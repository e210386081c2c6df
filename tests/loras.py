"""Random LoRAs and their files as other programs write them, built from their names alone, apart from our tables."""

import functools
import json

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import acejax
from acejax.weights import keymaps
from tests.goldens import cases

CONFIG = cases.config()
RANK, ALPHA = 4, 6.0
HIDDEN, MLP = CONFIG.hidden_size, CONFIG.mlp_size

# ACE++'s targets in BFL's names, and diffusers' modules for them with their rows (diffusers `transformer_flux.py`)
DOUBLE = {
    "img_mod.lin": {"norm1.linear": 6 * HIDDEN},
    "img_attn.qkv": dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), HIDDEN),
    "img_attn.proj": {"attn.to_out.0": HIDDEN},
    "img_mlp.0": {"ff.net.0.proj": MLP},
    "img_mlp.2": {"ff.net.2": HIDDEN},
    "txt_mod.lin": {"norm1_context.linear": 6 * HIDDEN},
    "txt_attn.qkv": dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), HIDDEN),
    "txt_attn.proj": {"attn.to_add_out": HIDDEN},
    "txt_mlp.0": {"ff_context.net.0.proj": MLP},
    "txt_mlp.2": {"ff_context.net.2": HIDDEN},
}
SINGLE = {
    "modulation.lin": {"norm.linear": 3 * HIDDEN},
    "linear1": {"attn.to_q": HIDDEN, "attn.to_k": HIDDEN, "attn.to_v": HIDDEN, "proj_mlp": MLP},
    "linear2": {"proj_out": HIDDEN},
}
MODULES = {f"{ours}_blocks.{i}.{name}": {f"{theirs}_blocks.{i}.{part}": rows for part, rows in parts.items()}
           for ours, theirs, table, depth in (("double", "transformer", DOUBLE, CONFIG.depth),
                                              ("single", "single_transformer", SINGLE, CONFIG.depth_single_blocks))
           for i in range(depth) for name, parts in table.items()}
INPUTS = {module: keymaps.expected(CONFIG, "bfl")[f"{module}.weight"][1] for module in MODULES}
OUTPUTS = {module: sum(parts.values()) for module, parts in MODULES.items()}

# Compiling is nearly all that these tests cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnames=("config", "execution"))
def velocity(config, params, tokens, lora=None, quant=None, execution=acejax.Execution()):
    """`acejax.apply`, under a name of its own: jax counts the programs of one function together."""
    return acejax.apply(config, params, tokens, lora=lora, quant=quant, execution=execution)


@functools.cache
def state():
    return cases.state(CONFIG)


@functools.cache
def params():
    return keymaps.from_foreign(CONFIG, state().__getitem__, "bfl")


def drawn(inputs, outputs, rank=RANK, seed=0):
    """Module -> (down [rank, in], up [out, rank]), as large as they need be for a velocity far from the base's."""
    normal = np.random.default_rng(seed).standard_normal
    return {module: (normal((rank, n), np.float32) / np.float32(n ** 0.5),
                     0.3 * normal((outputs[module], rank), np.float32)) for module, n in inputs.items()}


def factors(rank=RANK, seed=0):
    return drawn(INPUTS, OUTPUTS, rank, seed)


def split_factors(ranks=(RANK,), seed=0):
    """As `factors` on diffusers' modules, each with an A of its own; ranks by turns."""
    inputs = {part: INPUTS[module] for module, parts in MODULES.items() for part in parts}
    outputs = {part: rows for parts in MODULES.values() for part, rows in parts.items()}
    return {part: drawn({part: n}, outputs, ranks[i % len(ranks)], seed + i)[part]
            for i, (part, n) in enumerate(inputs.items())}


def merged(pairs, scale):
    """BFL's state with scale up down added; pairs by BFL's modules or by diffusers'."""
    out = dict(state())
    for module, parts in MODULES.items():
        key = f"{module}.weight"
        if module in pairs:
            down, up = pairs[module]
            out[key] = out[key] + scale * up @ down
        else:
            rows = [scale * pairs[part][1] @ pairs[part][0] if part in pairs else np.zeros((n, INPUTS[module]))
                    for part, n in parts.items()]
            out[key] = (out[key] + np.concatenate(rows)).astype(np.float32)
    return out


def expected(pairs, scale):
    """The velocity that these pairs make."""
    weights = keymaps.from_foreign(CONFIG, merged(pairs, scale).__getitem__, "bfl")
    return velocity(CONFIG, weights, cases.inputs(CONFIG))


def files(pairs, alpha=ALPHA, rank=RANK):
    """The same LoRA (by BFL's modules) as format -> (tensors, metadata, adapter_config.json or None)."""
    parts, start = {}, 0
    for module, (down, up) in pairs.items():
        start = 0
        for part, rows in MODULES[module].items():
            parts[part] = (down, up[start:start + rows])
            start += rows

    def named(pairs, form, a, b, **more):
        tensors = {}
        for module, (down, up) in pairs.items():
            name = form(module)
            tensors |= {f"{name}.{a}.weight": down, f"{name}.{b}.weight": np.ascontiguousarray(up)}
            tensors |= {f"{name}.{role}": np.array(value, np.float32) for role, value in more.items()}
        return tensors

    def kohya(module):
        return "lora_unet_" + module.replace(".", "_")

    blocks = {}  # kohya's split-dims: one A per projection stacked, up block-diagonal
    for module, (down, up) in pairs.items():
        sizes, wide = list(MODULES[module].values()), np.zeros((len(up), len(MODULES[module]) * rank), np.float32)
        for i, stop in enumerate(np.cumsum(sizes)):
            wide[stop - sizes[i]:stop, i * rank:(i + 1) * rank] = up[stop - sizes[i]:stop]
        blocks[module] = (np.tile(down, (len(sizes), 1)), wide)
    split_dims = named(blocks, kohya, "lora_down", "lora_up")
    split_dims |= {key.replace(".lora_down.weight", ".alpha"): np.array(alpha / rank * len(tensor), np.float32)
                   for key, tensor in split_dims.items() if key.endswith("lora_down.weight")}
    peft = {"r": rank, "lora_alpha": alpha, "target_modules": ["to_q"], "alpha_pattern": {}}
    return {
        "comfy": (named(pairs, kohya, "lora_down", "lora_up", alpha=alpha), {}, None),
        "split dims": (split_dims, {}, None),
        "kohya, diffusers' names": (named(parts, kohya, "lora_down", "lora_up", alpha=alpha), {}, None),
        "diffusers": (named(parts, "transformer.{}".format, "lora_A", "lora_B"),
                      {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in peft.items()})}, None),
        "diffusers with alphas": (named(parts, "transformer.{}".format, "lora_A", "lora_B", alpha=alpha), {}, None),
        "diffusers, bare": (named(parts, str, "lora_A", "lora_B", alpha=alpha), {}, None),
        "peft": (named(parts, "base_model.model.{}".format, "lora_A", "lora_B"), {}, json.dumps(peft)),
        "bfl": (named({module: (down, alpha / rank * up) for module, (down, up) in pairs.items()}, str, "lora_A",
                      "lora_B"), {}, None),
        "swift": (named(pairs, "model.{}".format, "lora_A.0_SwiftLoRA", "lora_B.0_SwiftLoRA"), {}, json.dumps(peft)),
    }


def deltas(lora):
    """What a tree adds to each kernel, by our path."""
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(lora, sep="/").items()}
    out = {}
    for module in {path.rpartition("/")[0] for path in leaves}:
        a, b, scale = (leaves[f"{module}/{name}"] for name in ("a", "b", "scale"))
        out[module] = np.einsum("...ir,...rf->...if", a, (b * scale.reshape(
            scale.shape + (1,) * (b.ndim - scale.ndim))).reshape(*a.shape[:-2], a.shape[-1], -1))
    return out
