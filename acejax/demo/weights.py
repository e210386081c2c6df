"""The demo's own small weights: the transformer in BFL's layout and the autoencoder, with a note of how they came."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors.numpy import load_file, save_file

from acejax.adapt.lora import combine
from acejax.data.layout import CanvasConfig
from acejax.demo.pictures import SIZE
from acejax.demo.surroundings import Autoencoder, decode_latents, encode_pictures, encode_prompts
from acejax.demo.tasks import TASKS
from acejax.edit.editor import Editor
from acejax.edit.profile import Profile
from acejax.edit.sampler import Sampler
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights.load import load_mmdit
from acejax.weights.lora_formats import load_lora
from acejax.weights.save import save_model

BATCH = 48  # edits at once
SHIPPED = epath.Path(__file__).parent / "small_weights"


def save(folder: epath.PathLike, config: MMDiTConfig, params: Any, autoencoder: Autoencoder,
         note: dict[str, Any]) -> None:
    """Write `mmdit.safetensors` (bfloat16), `autoencoder.safetensors` and, when they are whole, `weights.json`."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.json").unlink(missing_ok=True)
    save_model(folder / "mmdit.safetensors", config, params, dtype="bfloat16")
    save_file({name: np.asarray(value) for name, value in autoencoder.items()}, folder / "autoencoder.safetensors")
    (folder / "weights.json").write_text(json.dumps(note | {"config": dataclasses.asdict(config)}, indent=2) + "\n")


def load_editor(folder: epath.PathLike = SHIPPED, steps: int = 8,
                loras: Sequence[tuple[epath.PathLike, float]] = ()) -> Editor:
    """An editor with the weights in a folder.

    Args:
      loras: files and their strengths.

    Raises:
      UserError: no such weights, or a LoRA that is for others.
    """
    folder = epath.Path(folder)
    if not (folder / "weights.json").exists():
        raise UserError(f"{folder}: no demo weights there (weights.json, mmdit.safetensors, autoencoder.safetensors)")
    config = MMDiTConfig(**json.loads((folder / "weights.json").read_text())["config"])
    lora = combine([(load_lora(path, config), scale) for path, scale in loras]) if loras else None
    _, params = load_mmdit(folder / "mmdit.safetensors", config, dtype="float32")
    return make_editor(config, params, load_file(folder / "autoencoder.safetensors"), steps, lora)


def make_editor(config: MMDiTConfig, params: Any, autoencoder: Autoencoder, steps: int, lora: Any = None) -> Editor:
    """An editor in the demo's surroundings."""
    profile = Profile("small weights", TASKS, CanvasConfig(editing_height=1.0), steps, None, SIZE)
    return Editor(profile, Sampler(config, params), jax.jit(lambda pictures: encode_pictures(autoencoder, pictures)),
                  jax.jit(lambda latents: decode_latents(autoencoder, latents)), encode_prompts, lora=lora,
                  batch=BATCH, check_prompt=lambda prompt: encode_prompts([prompt]))
