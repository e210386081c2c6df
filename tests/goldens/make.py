"""Record what diffusers and transformers make of the small cases: `python -m tests.goldens.make` (needs torch)."""

import pathlib

import numpy as np

from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases

FLUX = pathlib.Path(__file__).with_name("flux.npz")
AUTOENCODER = pathlib.Path(__file__).with_name("autoencoder.npz")
TEXT = pathlib.Path(__file__).with_name("text.npz")


def name(channels: int, guidance: float) -> str:
    return f"channels_{channels}_guidance_{guidance:g}"


def flux() -> dict[str, np.ndarray]:
    """Velocities [B, S, 64] by case name; weights and tokens are `cases`'."""
    velocities = {}
    for channels in cases.CHANNELS:
        model = cases.config(channels)
        params = keymaps.from_foreign(model, cases.state(model).__getitem__, "bfl")
        for guidance in cases.GUIDANCE:
            velocities[name(channels, guidance)] = judges.flux_velocity(model, params, cases.inputs(model, guidance))
    return velocities


def autoencoder() -> dict[str, np.ndarray]:
    """Mean and log variance of the pictures and the decoded latents of `cases`."""
    model = cases.autoencoder()
    return judges.autoencoder(model, cases.state(model), *cases.pictures_and_latents())


def text() -> dict[str, np.ndarray]:
    """What transformers' T5 and CLIP make of `cases`' weights and ids."""
    t5, clip = cases.t5_config(), cases.clip_config()
    hidden, pooled = judges.clip_features(clip, cases.state(clip, layout="hf"), cases.clip_ids())
    return {"t5": judges.t5_features(t5, cases.state(t5, layout="hf"), cases.t5_ids()),
            "clip_hidden": hidden, "clip_pooled": pooled}


if __name__ == "__main__":
    for path, make in ((FLUX, flux), (AUTOENCODER, autoencoder), (TEXT, text)):
        np.savez_compressed(path, **make())
        print(f"{path}: {path.stat().st_size:,} bytes")
