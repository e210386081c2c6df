"""From pictures to a picture as the released code has it: both paths against programs made of other people's parts.

Ours: the canvas with parity="reference", the autoencoder, the sampler, the autoencoder. Theirs begin at the pictures
too: what ACE++'s processor does is stated in tests/data/statement.py, the rest is torch and diffusers.
"""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import acejax
from acejax.adapt.lora import combine
from acejax.data import latents
from acejax.data.canvas import editing
from acejax.data.layout import CanvasConfig
from acejax.edit.sampler import Sampler
from acejax.model import autoencoder
from acejax.weights import keymaps
from tests import judges, loras
from tests.data import random_pictures, statement
from tests.goldens import cases

VAE = acejax.AutoencoderConfig.tiny()
STEPS, GUIDANCE, TEXT = 4, 50.0, 6
RNG = np.random.default_rng(0)
SIZE = 48, 64
IMAGE, MASK = random_pictures.picture(RNG, SIZE), random_pictures.mask(RNG, SIZE, "box")
REFERENCE = random_pictures.picture(RNG, (60, 50))


def psnr(found, expected) -> float:
    """Of pictures in [-1, 1]."""
    assert found.shape == expected.shape
    return 10 * np.log10(4 / np.mean(np.square(found - expected)))


@functools.cache
def inputs(height: int, width: int) -> dict[str, np.ndarray]:
    """Noise and text; pictures of so many latent pixels."""
    normal = np.random.default_rng(1).standard_normal
    model = cases.config()
    return {"noise": normal((1, height, width, 16), np.float32), "text": normal((1, TEXT, model.context_in_dim),
            np.float32), "pooled": normal((1, model.vec_in_dim), np.float32)}


@functools.cache
def models(channels: int):
    """(config, params, the autoencoder's params, its state under diffusers' names)."""
    config, state = cases.config(channels), cases.state(VAE)
    return (config, keymaps.from_foreign(config, cases.state(config).__getitem__, "bfl"),
            keymaps.from_foreign(VAE, state.__getitem__, "bfl"), judges.autoencoder_names(state))


def ours(channels, mask, scale, lora=None) -> np.ndarray:
    """The decoded canvas [h, w, 3] in [-1, 1], not clamped."""
    config, params, ae, _ = models(channels)
    shape = (CanvasConfig if channels == 448 else CanvasConfig.lora)(parity="reference")
    canvas = editing(shape, IMAGE, mask, [REFERENCE], scale=scale)
    features = latents.encode([canvas], jax.jit(functools.partial(autoencoder.encode, VAE, ae)))
    given = inputs(*features["edit"].shape[1:3])
    made = Sampler(config, params)(features | given, given["noise"], STEPS, GUIDANCE, lora)
    return np.asarray(jax.jit(functools.partial(autoencoder.decode, VAE, ae))(made)[0])


class Theirs:
    """diffusers' models with the same weights; pictures are [h, w, 3] in [-1, 1]."""

    def __init__(self, channels, lora=None):
        import torch

        config, params, _, state = models(channels)
        self.vae = judges.autoencoder_kl(VAE).eval()
        self.vae.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in state.items()}, strict=True)
        self.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
        self.transformer = judges.flux_transformer(config, params, lora)

    def encode(self, picture):
        """The posterior's mean, unscaled."""
        import torch

        return self.vae.encode(torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None]).latent_dist.mode()

    def decode(self, z):
        return self.vae.decode(z / 0.3611 + 0.1159).sample[0].permute(1, 2, 0).numpy()

    def velocity(self, tokens, sigma, ids, text, pooled):
        import torch

        return self.transformer(hidden_states=tokens, encoder_hidden_states=text, pooled_projections=pooled,
                                timestep=torch.tensor([sigma], dtype=torch.float32), guidance=torch.tensor([GUIDANCE]),
                                img_ids=ids, txt_ids=torch.zeros(text.shape[1], 3)).sample


def diffusers_fill(item: statement.Item, lora) -> np.ndarray:
    """FluxFillPipeline's own packing of canvas and mask, and its scheduler."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
    from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift

    theirs = Theirs(384, lora)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    pipe = FluxFillPipeline(scheduler, theirs.vae, None, None, None, None, theirs.transformer)
    with torch.inference_mode():
        z = theirs.encode(item.edit)
        (height, width), pixels = z.shape[2:], item.mask.shape[:2]
        given = {name: torch.from_numpy(part) for name, part in inputs(height, width).items()}
        mask, masked = pipe.prepare_mask_latents(
            torch.tensor(item.mask, dtype=torch.float32).permute(2, 0, 1)[None], z, 1, 16, 1, *pixels, torch.float32,
            "cpu", None)
        known, ids = torch.cat([masked, mask], -1), pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu",
                                                                                   torch.float32)
        noisy = pipe._pack_latents(given["noise"].permute(0, 3, 1, 2).contiguous(), 1, 16, height, width)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=calculate_shift(noisy.shape[1]))
        for t in scheduler.timesteps:
            found = theirs.velocity(torch.cat([noisy, known], 2), float(t) / 1000, ids, given["text"], given["pooled"])
            noisy = scheduler.step(found, t, noisy, return_dict=False)[0]
        return theirs.decode(pipe._unpack_latents(noisy, *pixels, 8))


def fft_by_the_spec(item: statement.Item) -> np.ndarray:
    """Tokens, positions, noise levels and Euler spelt out, feature by feature."""
    import torch

    theirs = Theirs(448)
    with torch.inference_mode():
        edit, modify = (0.3611 * (theirs.encode(part) - 0.1159)[0].numpy() for part in (item.edit, item.modify))
        rows, columns = (side // 2 for side in edit.shape[1:])
        given = inputs(2 * rows, 2 * columns)
        grid = [(i, j) for i in range(rows) for j in range(columns)]

        def tokens(z):  # [16, h, w]: feature 4 c + 2 row + column of a 2 x 2 patch
            return np.stack([z[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2].ravel() for i, j in grid])

        features = np.arange(256)  # feature k of a mask's token is one of its 16 x 16 pixels
        channel, corner = features // 4, features % 4
        row, column = 8 * (corner // 2) + channel // 8, 8 * (corner % 2) + channel % 8
        mask = np.stack([item.mask[16 * i + row, 16 * j + column, 0] for i, j in grid])
        known = np.concatenate([tokens(edit), tokens(modify), mask], 1).astype(np.float32)
        ids = torch.tensor([(0, i, j) for i, j in grid], dtype=torch.float32)
        text, pooled = (torch.from_numpy(given[name]) for name in ("text", "pooled"))

        shift = np.exp(0.5 + (1.15 - 0.5) * (len(grid) - 256) / (4096 - 256))
        sigmas = [shift / (shift + (1 / tau - 1)) if tau else 0.0 for tau in np.linspace(1, 0, STEPS + 1)]
        x = tokens(given["noise"][0].transpose(2, 0, 1))
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            seen = torch.from_numpy(np.concatenate([x, known], 1).astype(np.float32))[None]
            x = x + (following - sigma) * theirs.velocity(seen, sigma, ids, text, pooled)[0].numpy()
        z = np.zeros_like(edit)
        for token, (i, j) in zip(x, grid, strict=True):
            z[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2] = token.reshape(16, 2, 2)
        return theirs.decode(torch.from_numpy(z)[None])


@judges.needs_peft
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_lora_path_is_diffusers(scale, tmp_path):
    formats, files = loras.files(loras.factors()), {}
    for name in ("comfy", "diffusers"):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(*formats[name][:2], files[name]) if False else save_file(formats[name][0], files[name],
                                                                           formats[name][1])
    item = statement.editing(IMAGE, MASK, [REFERENCE], scale=scale, keep_pixels=False, use_change=False)
    expected = diffusers_fill(item, files["diffusers"])
    lora = acejax.load_lora(files["comfy"], cases.config(384))
    found = ours(384, MASK, scale, lora)
    print(psnr(found, expected))
    assert psnr(found, expected) >= 50
    assert psnr(ours(384, None, scale, lora), expected) < 40
    assert psnr(ours(384, MASK, scale, combine([(lora, 0.5)])), expected) < 40


@judges.needs_diffusers
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_fft_path_is_the_specification(scale):
    item = statement.editing(IMAGE, MASK, [REFERENCE], scale=scale)
    expected = fft_by_the_spec(item)
    print(psnr(ours(448, MASK, scale), expected))
    assert psnr(ours(448, MASK, scale), expected) >= 50
    assert psnr(ours(448, None, scale), expected) < 40
