"""Small models of every kind, with random weights in their first layout."""

import dataclasses

import numpy as np

from acejax.model.config import AutoencoderConfig, CLIPConfig, T5Config
from acejax.weights import keymaps
from tests.goldens import cases

# FLUX's own heads and rope axes, so that the geometry is read off the tensors
MMDIT = dataclasses.replace(cases.config(384), out_channels=64, hidden_size=128, num_heads=1, axes_dim=(16, 56, 56),
                            depth=1, depth_single_blocks=2)
VAE = AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
T5 = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
CLIP = CLIPConfig(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
SMALL = (MMDIT, VAE, T5, CLIP)


def first(config) -> str:
    """The model's first layout."""
    return next(iter(keymaps.layouts_of(config)))


def state(config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors in the model's first layout."""
    draw = np.random.default_rng(seed).standard_normal
    return {key: draw(shape).astype(np.float32)
            for key, shape in sorted(keymaps.expected(config, first(config)).items())}


def params(config, seed: int = 0):
    """The same as our tree."""
    return keymaps.from_foreign(config, state(config, seed).__getitem__, first(config))
