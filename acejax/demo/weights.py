"""The demo's own small weights: the transformer in BFL's layout and the autoencoder, with a note of how they came."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from acejax.adapt.lora import combine
from acejax.data.layout import CanvasConfig
from acejax.demo.autoencoder import Autoencoder, decode_latents, encode_pictures, kind_of
from acejax.demo.surroundings import encode_prompts
from acejax.demo.tasks import TASKS
from acejax.edit.editor import Editor
from acejax.edit.profile import Profile
from acejax.edit.sampler import Sampler
from acejax.edit.tasks import Task
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights.load import load_mmdit
from acejax.weights.lora_formats import load_lora
from acejax.weights.save import save_model, save_tensors

BATCH = 48  # edits at once
AUTOENCODER = "autoencoder.safetensors"
SHIPPED = epath.Path(__file__).parent / "small_weights"


def save_autoencoder(path: epath.PathLike, autoencoder: Autoencoder) -> None:
    """Write an autoencoder, exactly: the finer kind is made of bfloat16 numbers."""
    dtype = jnp.float32 if kind_of(autoencoder) == "linear" else jnp.bfloat16
    save_tensors(path, {name: np.asarray(value).astype(dtype) for name, value in autoencoder.items()}, {})


def load_autoencoder(path: epath.PathLike) -> Autoencoder:
    """What `save_autoencoder` wrote, in float32.

    Raises:
      UserError: a file that is not there, or can't be read.
    """
    try:
        return {name: value.astype(np.float32) for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no autoencoder that can be read ({error})") from error


def save(folder: epath.PathLike, config: MMDiTConfig, params: Any, autoencoder: Autoencoder, size: int,
         note: dict[str, Any]) -> None:
    """Write `mmdit.safetensors` (bfloat16), `autoencoder.safetensors` and, when they are whole, `weights.json`."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.json").unlink(missing_ok=True)
    save_model(folder / "mmdit.safetensors", config, params, dtype="bfloat16")
    save_autoencoder(folder / AUTOENCODER, autoencoder)
    (folder / "weights.json").write_text(json.dumps(
        note | {"size": size, "autoencoder": kind_of(autoencoder), "config": dataclasses.asdict(config)}, indent=2)
        + "\n")


def read_note(folder: epath.PathLike = SHIPPED) -> dict[str, Any]:
    """`weights.json`: how the weights came, the pictures' `size` in pixels and `scales`, `euler_steps`, the
    kind of `autoencoder`, the `tasks` that they were trained on, the share of the picture under the mask that was
    hidden in each (`repainting`, 1 where nothing is said), `config`.

    Raises:
      UserError: no such weights.
    """
    path = epath.Path(folder) / "weights.json"
    if not path.exists():
        raise UserError(f"{folder}: no demo weights there (weights.json, mmdit.safetensors, autoencoder.safetensors)")
    try:
        note = json.loads(path.read_text())
        MMDiTConfig(**note["config"]), note["size"], note["euler_steps"], note["autoencoder"]
        list(note["tasks"]), list(note["scales"]), dict(note["repainting"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the note of a demo's weights ({' '.join(str(error).split())[:100]})") from error
    return note


def tasks_of(note: Mapping[str, Any]) -> dict[str, Task]:
    """The presets of the tasks in a note."""
    return {name: dataclasses.replace(task, scale=note["repainting"].get(name, 1.0)) for name, task in TASKS.items()
            if name in note["tasks"]}


def load_editor(folder: epath.PathLike = SHIPPED, steps: int | None = None,
                loras: Sequence[tuple[epath.PathLike, float]] = ()) -> Editor:
    """An editor with the weights in a folder; it takes `steps` Euler steps, or as many as their note says.

    Args:
      loras: files and their strengths.

    Raises:
      UserError: no such weights, an autoencoder of another kind than their note says, or a LoRA that is for others.
    """
    note, folder = read_note(folder), epath.Path(folder)
    config = MMDiTConfig(**note["config"])
    lora = combine([(load_lora(path, config), scale) for path, scale in loras]) if loras else None
    _, params = load_mmdit(folder / "mmdit.safetensors", config, dtype="float32")
    autoencoder = load_autoencoder(folder / AUTOENCODER)
    if (found := kind_of(autoencoder)) != note["autoencoder"]:
        raise UserError(f"{folder}/{AUTOENCODER} is {found}; weights.json says {note['autoencoder']}")
    tasks = tasks_of(note)

    def encode(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        for name in TASKS.keys() - tasks.keys():
            if (start := TASKS[name].starts) and any(prompt.lower().startswith(start) for prompt in prompts):
                raise UserError(f"{folder}: these weights have not learnt to {start.strip()}; they know the tasks "
                                f"{', '.join(tasks)}")
        return encode_prompts(prompts)

    profile = Profile("small weights", tasks, CanvasConfig(editing_height=1.0), steps or note["euler_steps"], None,
                      note["size"])
    return Editor(profile, Sampler(config, params), jax.jit(lambda pictures: encode_pictures(autoencoder, pictures)),
                  jax.jit(lambda latents: decode_latents(autoencoder, latents)), encode, lora=lora,
                  batch=BATCH, check_prompt=lambda prompt: encode([prompt]))
