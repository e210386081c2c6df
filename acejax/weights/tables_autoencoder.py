"""The autoencoder's key tables (`layout` says how to read them).

Names: black-forest-labs/flux `modules/autoencoder.py` (ae.safetensors); diffusers `models/autoencoders/vae.py`,
`models/unets/unet_2d_blocks.py` and `models/attention_processor.py` (AutoencoderKL).
"""

import itertools
from collections.abc import Mapping

from acejax.model.config import AutoencoderConfig
from acejax.weights.layout import Conv, Layout

PREFIXES = ("", "vae.", "first_stage_model.")  # BFL and diffusers themselves; two kinds of ComfyUI checkpoints
LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight"}

# One module a row: ours, BFL's name, diffusers' name.
BLOCK = (
    ("norm1", "norm1", "norm1"),
    ("conv1", "conv1", "conv1"),
    ("norm2", "norm2", "norm2"),
    ("conv2", "conv2", "conv2"),
    ("shortcut", "nin_shortcut", "conv_shortcut"),
)
ATTENTION = (
    ("norm", "norm", "group_norm"),
    ("q", "q", "to_q"),
    ("k", "k", "to_k"),
    ("v", "v", "to_v"),
    ("proj", "proj_out", "to_out.0"),
)


def _inside(ours: str, bfl: str, diffusers: str, rows: tuple[tuple[str, str, str], ...]) -> list[tuple[str, str, str]]:
    return [(f"{ours}/{row[0]}", f"{bfl}.{row[1]}", f"{diffusers}.{row[2]}") for row in rows]


# {side} is encoder or decoder; {b} a block; {i} a level, 0 the finest; {j} the same level counted from the coarsest, as
# diffusers counts in the decoder.
MODULES = (
    ("{side}/conv_in", "{side}.conv_in", "{side}.conv_in"),
    *_inside("encoder/down_{i}/block_{b}", "encoder.down.{i}.block.{b}", "encoder.down_blocks.{i}.resnets.{b}", BLOCK),
    ("encoder/down_{i}/downsample", "encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"),
    *_inside("{side}/mid/block_0", "{side}.mid.block_1", "{side}.mid_block.resnets.0", BLOCK),
    *_inside("{side}/mid/attention", "{side}.mid.attn_1", "{side}.mid_block.attentions.0", ATTENTION),
    *_inside("{side}/mid/block_1", "{side}.mid.block_2", "{side}.mid_block.resnets.1", BLOCK),
    *_inside("decoder/up_{i}/block_{b}", "decoder.up.{i}.block.{b}", "decoder.up_blocks.{j}.resnets.{b}", BLOCK),
    ("decoder/up_{i}/upsample", "decoder.up.{i}.upsample.conv", "decoder.up_blocks.{j}.upsamplers.0.conv"),
    ("{side}/norm_out", "{side}.norm_out", "{side}.conv_norm_out"),
    ("{side}/conv_out", "{side}.conv_out", "{side}.conv_out"),
)


def layouts(config: AutoencoderConfig) -> Mapping[str, Layout]:
    """The layouts by name: "bfl" as ae.safetensors, "diffusers" as AutoencoderKL."""
    bfl, diffusers = {}, {}
    levels = len(config.ch_mult)
    for side, i, b in itertools.product(("encoder", "decoder"), range(levels), range(config.num_res_blocks + 1)):
        for row in MODULES:
            ours, in_bfl, in_diffusers = (name.format(side=side, i=i, j=levels - 1 - i, b=b) for name in row)
            kind = ours.rsplit("/", 1)[1]
            linear = kind in ("q", "k", "v", "proj")
            module = ours if kind.startswith("norm") or linear else Conv(ours)
            bfl[in_bfl] = Conv(ours, pointwise=True) if linear else module
            diffusers[in_diffusers] = module
    marker = "encoder/mid/attention/q/kernel"
    return {name: Layout(LEAVES, modules, marker, PREFIXES)
            for name, modules in (("bfl", bfl), ("diffusers", diffusers))}
