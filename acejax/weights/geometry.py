"""Geometry of the models: read off the tensors of a file, and the `config.json` of their diffusers and HF folders.

Shapes tell almost all. What they do not tell (how rope splits a head, how many heads share a width, a group norm's
groups) is FLUX's unless a `config.json` says otherwise.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from acejax.errors import UserError
from acejax.model.config import AutoencoderConfig, CLIPConfig, MMDiTConfig, T5Config
from acejax.weights.keymaps import Config
from acejax.weights.layout import Layout, Shape
from acejax.weights.source import shown

MAX_LEVELS = 10  # of an autoencoder
OTHERWISE = " (or give config=, or a config.json beside the file)"


class Shapes:
    """The shapes of a file's tensors, asked by our leaf paths."""

    def __init__(self, shapes: Mapping[str, Shape], layout: Layout, json: Mapping[str, Any] | None = None):
        self._shapes, self._layout, self._json = shapes, layout, json or {}

    def key(self, leaf: str, layer: int | str = 0) -> str:
        return self._layout.key(leaf).format(i=layer)

    def of(self, leaf: str, axes: int = 2) -> Shape:
        """The shape of one tensor, of this many axes.

        Raises:
          UserError: absent, of other axes, or with an empty one.
        """
        key = self.key(leaf)
        shape = self._shapes.get(key)
        if shape is None or len(shape) != axes or 0 in shape:
            raise UserError(f"{shown(key)} is {'missing' if shape is None else shape}; expected {axes} axes, none "
                            f"empty, to read the config from{OTHERWISE}")
        return shape

    def has(self, leaf: str) -> bool:
        return self.key(leaf) in self._shapes

    def depth(self, leaf: str) -> int:
        """Layers of a stacked leaf: the highest that a key names, but no more than there are tensors."""
        pattern = re.escape(self.key(leaf, "LAYER")).replace("LAYER", "([0-9]{1,9})")
        layers = [int(found[1]) for key in self._shapes if (found := re.fullmatch(pattern, key))]
        return min(1 + max(layers, default=0), len(self._shapes))  # a wild number costs nothing

    def numbered(self, pattern: str) -> dict[tuple[int, ...], Shape]:
        """Numbers that a key pattern matches -> shape."""
        return {tuple(map(int, found.groups())): shape for key, shape in self._shapes.items()
                if (found := re.fullmatch(pattern, key))}

    def untold(self, field: str, default: Any) -> Any:
        """A field of the `config.json` that no tensor tells; FLUX's where there is none.

        Raises:
          UserError: a value of another type.
        """
        value = self._json.get(field)
        if value is None:
            return default
        if isinstance(default, tuple):
            if isinstance(value, list) and all(map(_is_count, value)):
                return tuple(value)
        elif isinstance(default, int):
            if _is_count(value):
                return value
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        wanted = ("a list of whole numbers" if isinstance(default, tuple)
                  else "a whole number" if isinstance(default, int) else "a finite number")
        raise UserError(f"config.json: {field} is {shown(value)}; expected {wanted}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _mmdit(shapes: Shapes) -> MMDiTConfig:
    flux = MMDiTConfig()
    hidden, channels = shapes.of("img_in/kernel")
    (head,) = shapes.of("double_blocks/img/query_norm/scale", axes=1)
    axes = shapes.untold("axes_dims_rope", flux.axes_dim)
    if head != sum(axes) or hidden % head:
        raise UserError(f"{shapes.key('img_in/kernel')!r} has shape {(hidden, channels)} and "
                        f"{shapes.key('double_blocks/img/query_norm/scale')!r} has {(head,)}; expected "
                        f"FLUX's heads of {sum(axes)} and a multiple of it, to read the config from{OTHERWISE}")
    return MMDiTConfig(
        in_channels=channels, out_channels=shapes.of("final_layer/linear/kernel")[0], hidden_size=hidden,
        num_heads=hidden // head, depth=shapes.depth("double_blocks/img/query_norm/scale"),
        depth_single_blocks=shapes.depth("single_blocks/query_norm/scale"),
        mlp_ratio=shapes.of("double_blocks/img/mlp_in/kernel")[0] / hidden, axes_dim=axes,
        context_in_dim=shapes.of("txt_in/kernel")[1], vec_in_dim=shapes.of("vector_in/in_layer/kernel")[1],
        guidance_embed=shapes.has("guidance_in/in_layer/kernel"))


def _autoencoder(shapes: Shapes) -> AutoencoderConfig:
    flux = AutoencoderConfig()
    blocks = {place: shape[0] for place, shape in shapes.numbered(
        r"encoder\.down(?:_blocks)?\.([0-9]{1,3})\.(?:block|resnets)\.([0-9]{1,3})\.conv1\.weight").items()
        if len(shape) == 4}
    ch = shapes.of("encoder/conv_in/kernel", axes=4)[0]
    widths = [blocks[level, 0] for level in range(len(blocks)) if (level, 0) in blocks]
    if not 0 < len(widths) <= MAX_LEVELS or any(width % ch for width in widths):
        raise UserError(f"the encoder's levels have {shown(widths)} channels; expected 1 to {MAX_LEVELS} multiples of "
                        f"{ch}, those of {shapes.key('encoder/conv_in/kernel')!r}, to read the config from{OTHERWISE}")
    return AutoencoderConfig(
        ch=ch, ch_mult=tuple(width // ch for width in widths), num_res_blocks=sum(level == 0 for level, _ in blocks),
        z_channels=max(1, shapes.of("encoder/conv_out/kernel", axes=4)[0] // 2),
        num_groups=shapes.untold("norm_num_groups", flux.num_groups),
        scale_factor=shapes.untold("scaling_factor", flux.scale_factor),
        shift_factor=shapes.untold("shift_factor", flux.shift_factor))


def _t5(shapes: Shapes) -> T5Config:
    xxl = T5Config()
    vocab, width = shapes.of("token_embedding/embedding")
    buckets, heads = shapes.of("relative_bias/embedding")
    wanted = shapes.untold("relative_attention_num_buckets", xxl.relative_attention_num_buckets)
    if buckets != wanted:
        raise UserError(f"{shapes.key('relative_bias/embedding')!r} has shape {(buckets, heads)}; expected T5's "
                        f"{wanted} buckets and a column for each head{OTHERWISE}")
    inner = shapes.of("blocks/proj/kernel")[1]
    if inner % heads:
        raise UserError(f"{shapes.key('blocks/proj/kernel')!r} reads {inner} features; expected a multiple of the "
                        f"{heads} heads of {shapes.key('relative_bias/embedding')!r}")
    return T5Config(
        vocab_size=vocab, d_model=width, d_kv=inner // heads, d_ff=shapes.of("blocks/mlp_in/kernel")[0],
        num_layers=shapes.depth("blocks/attention_norm/scale"), num_heads=heads, relative_attention_num_buckets=buckets,
        relative_attention_max_distance=shapes.untold("relative_attention_max_distance",
                                                      xxl.relative_attention_max_distance),
        layer_norm_epsilon=shapes.untold("layer_norm_epsilon", xxl.layer_norm_epsilon))


def _clip(shapes: Shapes) -> CLIPConfig:
    large = CLIPConfig()
    vocab, width = shapes.of("token_embedding/embedding")
    return CLIPConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=shapes.of("blocks/mlp_in/kernel")[0],
        num_hidden_layers=shapes.depth("blocks/attention_norm/scale"),
        num_attention_heads=shapes.untold("num_attention_heads", max(1, width // large.head_dim)),
        max_position_embeddings=shapes.of("position_embedding/embedding")[0],
        layer_norm_eps=shapes.untold("layer_norm_eps", large.layer_norm_eps))


_READERS: Mapping[type, Callable[[Shapes], Any]] = {
    MMDiTConfig: _mmdit, AutoencoderConfig: _autoencoder, T5Config: _t5, CLIPConfig: _clip}


def read(kind: type, shapes: Shapes) -> Config:
    """The config of a model of this kind.

    Raises:
      UserError: tensors that tell none.
    """
    try:
        return _READERS[kind](shapes)
    except (TypeError, ValueError) as error:  # UserError too: what a config refuses
        raise UserError(str(error)) from None


def to_json(config: Config) -> dict[str, Any]:
    """The `config.json` that diffusers or transformers wants beside the tensors.

    Raises:
      UserError: a model that they have no config for.
    """
    if isinstance(config, MMDiTConfig):
        if config.mlp_ratio != 4:
            raise UserError(f"diffusers' FLUX has MLPs 4 times as wide as its stream, this model {config.mlp_ratio:g} "
                            "times; expected another layout, such as bfl")
        return {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": config.in_channels,
                "out_channels": config.out_channels, "num_layers": config.depth,
                "num_single_layers": config.depth_single_blocks, "attention_head_dim": config.head_dim,
                "num_attention_heads": config.num_heads, "joint_attention_dim": config.context_in_dim,
                "pooled_projection_dim": config.vec_in_dim, "guidance_embeds": config.guidance_embed,
                "axes_dims_rope": list(config.axes_dim)}
    if isinstance(config, AutoencoderConfig):
        levels = len(config.ch_mult)
        return {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu",
                "block_out_channels": list(config.widths), "layers_per_block": config.num_res_blocks,
                "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
                "latent_channels": config.z_channels, "norm_num_groups": config.num_groups,
                "scaling_factor": config.scale_factor, "shift_factor": config.shift_factor, "sample_size": 1024,
                "force_upcast": True, "mid_block_add_attention": True, "use_quant_conv": False,
                "use_post_quant_conv": False}
    if isinstance(config, T5Config):
        return {"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False, "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1,
                "decoder_start_token_id": 0, **vars(config)}
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
            "projection_dim": config.hidden_size, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
            **vars(config)}
