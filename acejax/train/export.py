"""A run's weights as safetensors files, written while it trains on."""

import concurrent.futures
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import keymaps, save
from acejax.weights.lora_formats import save_lora

PIECE = 2**28  # bytes of a leaf that are gathered at once, on every device where there are several processes


class Exports:
    """`<workdir>/exports/step_000123.safetensors` of steps that are asked for; process 0 writes, in the background.

    Args:
      workdir: of the run.
      config: of the model.
      layouts: "bfl", "comfy" (bfl's names under ComfyUI's prefix) or "diffusers"; of several, each is a file
        `step_000123_comfy.safetensors` of its own.
      dtype: of the numbers, by name; None keeps what they have.
      lora: whether a LoRA is written (`acejax.save_lora`), which has no "bfl".
    """

    def __init__(self, workdir: epath.PathLike, config: MMDiTConfig, layouts: Sequence[str] = ("bfl",),
                 dtype: str | None = None, lora: bool = False):
        self._folder, self._config = epath.Path(workdir) / "exports", config
        self._layouts, self._dtype, self._lora = tuple(layouts), dtype and jnp.dtype(dtype), lora
        self._pool, self._writing = concurrent.futures.ThreadPoolExecutor(1), None

    def save(self, step: int, params: Any) -> None:
        """Begin to write a step, after the one before is written; every process calls it.

        Process 0 takes the parameters into its memory, the others no more than a piece of a leaf.

        Raises:
          UserError: the one before could not be written.
        """
        self.close()
        host = jax.tree.map(_gather, params)
        if jax.process_index() == 0:
            self._writing = self._pool.submit(self._write, step, host)

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
          UserError: it could not be.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, step: int, params: Any) -> None:
        for layout in self._layouts:
            self._write_one(f"step_{step:06d}{f'_{layout}' * (len(self._layouts) > 1)}.safetensors", params, layout)

    def _write_one(self, name: str, params: Any, layout: str) -> None:
        if "://" not in str(self._folder):
            self._save(self._folder / name, params, layout)
            return
        with tempfile.TemporaryDirectory() as beside:  # an object store takes whole files only
            self._save(epath.Path(beside) / name, params, layout)
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                (epath.Path(beside) / name).copy(self._folder / name, overwrite=True)
            except OSError as error:
                raise UserError(f"{self._folder / name}: cannot be written ({error})") from error

    def _save(self, path: epath.Path, params: Any, layout: str) -> None:
        if self._lora:
            save_lora(path, self._config, params, layout, self._dtype)
        elif layout == "comfy":
            save.save_model(path, self._config, params, "bfl", dtype=self._dtype, prefix=keymaps.COMFY)
        else:
            save.save_model(path, self._config, params, layout, dtype=self._dtype)


def _gather(leaf: jax.Array) -> np.ndarray | None:
    """The whole of a leaf on process 0, piece by piece along its first axis; None on the others."""
    first = jax.process_index() == 0
    whole = np.empty(leaf.shape, leaf.dtype) if first else None
    rows = min(len(leaf), max(1, PIECE * len(leaf) // leaf.nbytes))
    for start in range(0, len(leaf), rows):
        start = min(start, len(leaf) - rows)  # pieces of one shape: one program
        piece = jax.lax.dynamic_slice_in_dim(leaf, start, rows)
        piece = multihost_utils.process_allgather(piece, tiled=True) if jax.process_count() > 1 else np.asarray(piece)
        if first:
            whole[start:start + rows] = piece
    return whole
