"""Outside judges: torch, diffusers, transformers, where installed. Only their tests may be left out on a machine."""

import importlib.util
import pathlib
import re
from collections.abc import Mapping

import numpy as np
import pytest

import acejax
from acejax.model.config import CLIPConfig, T5Config
from acejax.weights import keymaps


def needs(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in names),
        reason=f"outside judge: not all of {', '.join(names)} are installed; parity is held against tests/goldens")


needs_diffusers = needs("torch", "diffusers")
needs_transformers = needs("torch", "transformers")
needs_peft = needs("torch", "diffusers", "peft")


def difference(found, expected) -> float:
    """The greatest difference, in standard deviations of the expected output."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


def flux_transformer(model: acejax.MMDiTConfig, params: acejax.model.mmdit.Params, lora: pathlib.Path | None = None):
    """diffusers' FluxTransformer2DModel of the same weights; `lora` is a file for its own loader."""
    import torch
    from diffusers import FluxTransformer2DModel
    from diffusers.models.attention import FeedForward
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    judge = FluxTransformer2DModel(
        in_channels=model.in_channels, out_channels=model.out_channels, num_layers=model.depth,
        num_single_layers=model.depth_single_blocks, attention_head_dim=model.head_dim,
        num_attention_heads=model.num_heads, joint_attention_dim=model.context_in_dim,
        pooled_projection_dim=model.vec_in_dim, guidance_embeds=model.guidance_embed, axes_dims_rope=model.axes_dim)
    if model.mlp_ratio != 4:  # FLUX's, which the whole class has no argument for; its parts have
        width, heads = model.hidden_size, (model.num_heads, model.head_dim)
        for block in judge.transformer_blocks:
            block.ff, block.ff_context = (FeedForward(width, width, mult=model.mlp_ratio,
                                                      activation_fn="gelu-approximate") for _ in range(2))
        judge.single_transformer_blocks = torch.nn.ModuleList(
            FluxSingleTransformerBlock(width, *heads, mlp_ratio=model.mlp_ratio)
            for _ in range(model.depth_single_blocks))
    state = keymaps.to_foreign(model, params, "diffusers")
    judge.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in state.items()}, strict=True)

    if lora is not None:
        judge.load_lora_adapter(str(lora.parent), weight_name=lora.name)
    return judge.eval()


def flux_velocity(model: acejax.MMDiTConfig, params: acejax.model.mmdit.Params, tokens: acejax.Tokens,
                  lora: pathlib.Path | None = None) -> np.ndarray:
    """What `flux_transformer` makes of tokens, [B, S, 64] float32."""
    return velocity(flux_transformer(model, params, lora), tokens)


def velocity(judge, tokens: acejax.Tokens) -> np.ndarray:
    """What a FluxTransformer2DModel makes of tokens, [B, S, 64] float32."""
    import torch

    def tensor(x):
        return None if x is None else torch.from_numpy(np.array(x))

    with torch.inference_mode():
        out = judge.eval()(
            hidden_states=tensor(tokens.image), encoder_hidden_states=tensor(tokens.text),
            pooled_projections=tensor(tokens.pooled), timestep=tensor(tokens.sigma), guidance=tensor(tokens.guidance),
            img_ids=tensor(tokens.positions[0]).float(), txt_ids=torch.zeros(tokens.text.shape[1], 3))
    return out.sample.numpy()


def autoencoder_kl(model: acejax.AutoencoderConfig):
    """diffusers' AutoencoderKL of the same geometry, with random weights."""
    from diffusers import AutoencoderKL

    levels = len(model.ch_mult)
    return AutoencoderKL(
        block_out_channels=model.widths, layers_per_block=model.num_res_blocks, latent_channels=model.z_channels,
        norm_num_groups=model.num_groups, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, use_quant_conv=False, use_post_quant_conv=False)


def autoencoder_names(state: Mapping[str, np.ndarray], levels: int = 4) -> dict[str, np.ndarray]:
    """ae.safetensors' tensors under diffusers' names, written apart from our tables."""
    names = {"norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut", "mid.block_1": "mid_block.resnets.0",
             "mid.block_2": "mid_block.resnets.1", "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
             "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", "downsample": "downsamplers.0",
             "upsample": "upsamplers.0", "block": "resnets"}
    names |= {f"mid.attn_1.{x}": f"mid_block.attentions.0.to_{x}" for x in "qkv"}
    renamed = {}
    for key, tensor in state.items():
        key, attends = re.sub(r"\b(" + "|".join(names) + r")\b", lambda name: names[name[0]], key), "attn" in key
        key = re.sub(r"\bdown\.", "down_blocks.", key)
        key = re.sub(r"\bup\.(\d)", lambda level: f"up_blocks.{levels - 1 - int(level[1])}", key)
        renamed[key] = tensor.reshape(tensor.shape[:2]) if attends else tensor
    return renamed


def autoencoder(model: acejax.AutoencoderConfig, state: Mapping[str, np.ndarray], pictures: np.ndarray,
                latents: np.ndarray) -> dict[str, np.ndarray]:
    """What AutoencoderKL makes of weights in BFL's layout: `mean` and `logvar` of pictures, `picture` of latents."""
    import torch

    judge = autoencoder_kl(model).eval()
    state = autoencoder_names(state, len(model.ch_mult))
    judge.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in state.items()}, strict=True)

    def channels_first(x):
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())

    with torch.inference_mode():
        posterior = judge.encode(channels_first(pictures)).latent_dist
        picture = judge.decode(channels_first(latents) / 0.3611 + 0.1159).sample
    return {name: x.numpy().transpose(0, 2, 3, 1).copy() for name, x in (
        ("mean", posterior.mean), ("logvar", posterior.logvar), ("picture", picture))}


def t5_encoder(model: T5Config) -> "torch.nn.Module":  # noqa: F821
    """transformers' encoder of this geometry, on torch's current device."""
    import transformers

    return transformers.T5EncoderModel(transformers.T5Config(**vars(model), feed_forward_proj="gated-gelu"))


def clip_encoder(model: CLIPConfig) -> "torch.nn.Module":  # noqa: F821
    """transformers' encoder of this geometry, on torch's current device."""
    import transformers

    tokens = {f"{name}_token_id": model.vocab_size - 1 for name in ("bos", "eos", "pad")}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**vars(model), **tokens, hidden_act="quick_gelu"))


def t5_features(model: T5Config, state: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """What transformers' T5EncoderModel makes of weights in its own names; no mask, as FLUX. [B, T, D] float32."""
    import torch

    judge = t5_encoder(model)
    tensors = {key: torch.from_numpy(tensor) for key, tensor in state.items()}
    judge.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, strict=True)
    with torch.inference_mode():
        return judge.eval()(input_ids=torch.from_numpy(ids).long()).last_hidden_state.numpy()


def clip_features(model: CLIPConfig, state: dict[str, np.ndarray], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What transformers' CLIPTextModel makes of weights in its own names: hidden [B, T, D], pooled [B, D] float32."""
    import torch

    judge = clip_encoder(model)
    judge.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in state.items()}, strict=True)
    with torch.inference_mode():
        out = judge.eval()(input_ids=torch.from_numpy(ids).long())
    return out.last_hidden_state.numpy(), out.pooler_output.numpy()
