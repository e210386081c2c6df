"""What we write is what diffusers and transformers themselves load, with their own loaders, and means the same."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

import acejax
from acejax.cli import convert as command
from acejax.weights import keymaps, save
from tests import judges
from tests.goldens import cases
from tests.weights.models import MMDIT


def channels_first(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


@judges.needs_diffusers
@pytest.mark.parametrize("shards", [False, True])
def test_diffusers_loads_a_converted_transformer(tmp_path, monkeypatch, shards):
    """A file as BFL publishes it, through the command, with FLUX's own heads so that nothing needs to be said."""
    from diffusers import FluxTransformer2DModel

    if shards:
        monkeypatch.setattr(save, "SHARD", 300_000)
    save_file(cases.state(MMDIT), tmp_path / "flux.safetensors")
    assert command.main([str(tmp_path / "flux.safetensors"), str(tmp_path / "transformer"), "--to", "diffusers"]) == 0
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists() == shards
    judge, loading = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(loading.values())
    tokens = cases.inputs(MMDIT)
    config, params = acejax.load_mmdit(tmp_path / "flux.safetensors")
    assert judges.difference(acejax.apply(config, params, tokens), judges.velocity(judge.eval(), tokens)) < 1e-4


def test_a_model_that_diffusers_has_no_config_for_is_told(tmp_path):
    config = dataclasses.replace(MMDIT, mlp_ratio=2.0)
    save_file(cases.state(config), tmp_path / "flux.safetensors")
    with pytest.raises(acejax.UserError, match="this model 2 times"):
        command.main([str(tmp_path / "flux.safetensors"), str(tmp_path / "transformer"), "--to", "diffusers"])
    assert [path.name for path in tmp_path.iterdir()] == ["flux.safetensors"]


@judges.needs_diffusers
def test_diffusers_loads_a_converted_autoencoder(tmp_path):
    import torch
    from diffusers import AutoencoderKL

    config = cases.autoencoder()
    params = keymaps.from_foreign(config, cases.state(config).__getitem__, "bfl")
    acejax.save_model(tmp_path / "vae", config, params, "diffusers")
    judge, loading = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(loading.values())
    assert (judge.config.scaling_factor, judge.config.shift_factor) == (0.3611, 0.1159)
    pictures, latents = cases.pictures_and_latents()
    with torch.inference_mode():
        mean = judge.eval().encode(channels_first(pictures)).latent_dist.mean
        picture = judge.decode(channels_first(latents) / 0.3611 + 0.1159).sample
    found = acejax.autoencoder.moments(config, params, pictures)[0]
    assert judges.difference(channels_first(found), mean) < 1e-4
    assert judges.difference(channels_first(acejax.autoencoder.decode(config, params, latents)), picture) < 1e-4


@judges.needs_transformers
@pytest.mark.parametrize("name", ["T5EncoderModel", "CLIPTextModel"])
def test_transformers_loads_a_written_encoder(tmp_path, name):
    import torch
    import transformers

    config = cases.t5_config() if name.startswith("T5") else cases.clip_config()
    ids = cases.t5_ids() if name.startswith("T5") else cases.clip_ids()
    params = keymaps.from_foreign(config, cases.state(config, layout="hf").__getitem__, "hf")
    acejax.save_model(tmp_path / "encoder", config, params, "hf")
    judge, loading = getattr(transformers, name).from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    with torch.inference_mode():
        expected = judge.eval()(input_ids=torch.from_numpy(ids).long()).last_hidden_state.numpy()
    model = acejax.t5 if name.startswith("T5") else acejax.clip
    found = model.apply(config, params, ids)
    assert judges.difference(found if name.startswith("T5") else found[0], expected) < 1e-4
