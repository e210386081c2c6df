"""From pictures to a picture as the released code has it: both paths against programs made of other people's parts.

Ours is the editor with parity="reference". Theirs begin at the pictures too: what ACE++'s processor does is stated in
tests/data/statement.py, the rest is torch and diffusers.
"""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import acejax
from acejax.data.canvas import denormalize, editing
from acejax.edit.editor import Editor
from acejax.edit.profile import Profile
from acejax.edit.sampler import Sampler
from acejax.model import autoencoder
from acejax.weights import keymaps
from tests import judges, loras
from tests.counts import count
from tests.data import random_pictures, statement
from tests.goldens import cases

VAE = acejax.AutoencoderConfig.tiny()
STEPS, GUIDANCE, TEXT, SEED = 4, 50.0, 6, 7
RNG = np.random.default_rng(0)
SIZE = 48, 64
IMAGE, MASK = random_pictures.picture(RNG, SIZE), random_pictures.mask(RNG, SIZE, "box")
REFERENCE = random_pictures.picture(RNG, (60, 50))


def psnr(found, expected) -> float:
    """Of pictures, uint8."""
    assert found.shape == expected.shape and expected.std() > 20  # something is to be seen
    return 10 * np.log10(255**2 / np.maximum(np.square(found - expected.astype(float)).mean(), 1e-9))


@functools.cache
def given(height: int, width: int) -> dict[str, np.ndarray]:
    """Noise of the seed, and a prompt's features."""
    normal, model = np.random.default_rng(1).standard_normal, cases.config()
    return {"noise": np.asarray(jax.random.normal(jax.random.key(SEED), (1, height, width, 16))),
            "text": normal((1, TEXT, model.context_in_dim), np.float32),
            "pooled": normal((1, model.vec_in_dim), np.float32)}


@functools.cache
def models(channels: int):
    """(config, params, editor, the autoencoder's state under diffusers' names)."""
    config, state = cases.config(channels), cases.state(VAE)
    params = keymaps.from_foreign(config, cases.state(config).__getitem__, "bfl")
    ae = keymaps.from_foreign(VAE, state.__getitem__, "bfl")
    encode, decode = (jax.jit(functools.partial(run, VAE, ae)) for run in (autoencoder.encode, autoencoder.decode))
    editor = Editor(Profile.of(config, "reference"), Sampler(config, params), encode, decode, None)
    return config, params, editor, judges.autoencoder_names(state)


def ours(channels, mask, scale, lora=None) -> np.ndarray:
    """The whole canvas [h, w, 3] uint8."""
    editor = models(channels)[2]
    editor.lora, text = lora, given(2, 2)
    canvas = editing(editor.profile.canvas, IMAGE, mask, [REFERENCE], scale=scale)
    return editor.generate([canvas], (text["text"], text["pooled"]), [SEED], STEPS, GUIDANCE)[0]


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
        return denormalize(self.vae.decode(z / 0.3611 + 0.1159).sample[0].permute(1, 2, 0).numpy())

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
        tensors = {name: torch.tensor(part) for name, part in given(height, width).items()}
        mask, masked = pipe.prepare_mask_latents(
            torch.tensor(item.mask, dtype=torch.float32).permute(2, 0, 1)[None], z, 1, 16, 1, *pixels, torch.float32,
            "cpu", None)
        known, ids = torch.cat([masked, mask], -1), pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu",
                                                                                   torch.float32)
        noisy = pipe._pack_latents(tensors["noise"].permute(0, 3, 1, 2).contiguous(), 1, 16, height, width)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=calculate_shift(noisy.shape[1]))
        for t in scheduler.timesteps:
            found = theirs.velocity(torch.cat([noisy, known], 2), float(t) / 1000, ids, tensors["text"],
                                    tensors["pooled"])
            noisy = scheduler.step(found, t, noisy, return_dict=False)[0]
        return theirs.decode(pipe._unpack_latents(noisy, *pixels, 8))


def fft_by_the_spec(item: statement.Item) -> np.ndarray:
    """Tokens, positions, noise levels and Euler spelt out, feature by feature."""
    import torch

    theirs = Theirs(448)
    with torch.inference_mode():
        edit, modify = (0.3611 * (theirs.encode(part) - 0.1159)[0].numpy() for part in (item.edit, item.modify))
        rows, columns = (side // 2 for side in edit.shape[1:])
        drawn = given(2 * rows, 2 * columns)
        grid = [(i, j) for i in range(rows) for j in range(columns)]

        def tokens(z):  # [16, h, w]: feature 4 c + 2 row + column of a 2 x 2 patch
            return np.stack([z[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2].ravel() for i, j in grid])

        features = np.arange(256)  # feature k of a mask's token is one of its 16 x 16 pixels
        channel, corner = features // 4, features % 4
        row, column = 8 * (corner // 2) + channel // 8, 8 * (corner % 2) + channel % 8
        mask = np.stack([item.mask[16 * i + row, 16 * j + column, 0] for i, j in grid])
        known = np.concatenate([tokens(edit), tokens(modify), mask], 1).astype(np.float32)
        ids = torch.tensor([(0, i, j) for i, j in grid], dtype=torch.float32)
        text, pooled = (torch.tensor(drawn[name]) for name in ("text", "pooled"))

        shift = np.exp(0.5 + (1.15 - 0.5) * (len(grid) - 256) / (4096 - 256))
        sigmas = [shift / (shift + (1 / tau - 1)) if tau else 0.0 for tau in np.linspace(1, 0, STEPS + 1)]
        x = tokens(drawn["noise"][0].transpose(2, 0, 1))
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            seen = torch.from_numpy(np.concatenate([x, known], 1).astype(np.float32))[None]
            x = x + (following - sigma) * theirs.velocity(seen, sigma, ids, text, pooled)[0].numpy()
        z = np.zeros_like(edit)
        for token, (i, j) in zip(x, grid, strict=True):
            z[:, 2 * i:2 * i + 2, 2 * j:2 * j + 2] = token.reshape(16, 2, 2)
        return theirs.decode(torch.from_numpy(z)[None])


@judges.needs_peft
@pytest.mark.parametrize("scale", count([0.5], [0.0, 0.5, 1.0]))
def test_the_lora_path_is_diffusers(scale, tmp_path):
    formats = loras.files(loras.factors())
    for name in ("comfy", "diffusers"):
        save_file(formats[name][0], tmp_path / f"{name}.safetensors", formats[name][1])
    item = statement.editing(IMAGE, MASK, [REFERENCE], scale=scale, keep_pixels=False, use_change=False)
    expected = diffusers_fill(item, tmp_path / "diffusers.safetensors")
    lora = acejax.load_lora(tmp_path / "comfy.safetensors", cases.config(384))
    found = psnr(ours(384, MASK, scale, lora), expected)
    print(f"Fill and LoRA, scale {scale}: {found:.1f} dB")
    assert found >= 50
    assert psnr(ours(384, None, scale, lora), expected) < 40, "another mask is seen"
    assert psnr(ours(384, MASK, scale, jax.tree.map(lambda x: x / 2, lora)), expected) < 40, "so is another LoRA"


@judges.needs_diffusers
@pytest.mark.parametrize("scale", count([0.0], [0.0, 0.5, 1.0]))
def test_the_fft_path_is_the_specification(scale):
    expected = fft_by_the_spec(statement.editing(IMAGE, MASK, [REFERENCE], scale=scale))
    found = psnr(ours(448, MASK, scale), expected)
    print(f"FFT, scale {scale}: {found:.1f} dB")
    assert found >= 50
    assert psnr(ours(448, None, scale), expected) < 40
