"""A run's weights as safetensors files, written while it trains on."""

import concurrent.futures
import tempfile
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import keymaps, save

PIECE = 2**28  # bytes of a leaf that are gathered at once, on every device where there are several processes


class Exports:
    """`<workdir>/exports/step_000123.safetensors` of steps that are asked for; process 0 writes, in the background.

    Args:
      workdir: of the run.
      config: of the model.
      layout: "bfl", "comfy" (bfl's names under ComfyUI's prefix) or "diffusers".
    """

    def __init__(self, workdir: epath.PathLike, config: MMDiTConfig, layout: str):
        self._folder, self._config = epath.Path(workdir) / "exports", config
        self._layout, self._prefix = ("bfl", keymaps.COMFY) if layout == "comfy" else (layout, None)
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
        name = f"step_{step:06d}.safetensors"
        if "://" not in str(self._folder):
            save.save_model(self._folder / name, self._config, params, self._layout, prefix=self._prefix)
            return
        with tempfile.TemporaryDirectory() as beside:  # an object store takes whole files only
            save.save_model(epath.Path(beside) / name, self._config, params, self._layout, prefix=self._prefix)
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                (epath.Path(beside) / name).copy(self._folder / name, overwrite=True)
            except OSError as error:
                raise UserError(f"{self._folder / name}: cannot be written ({error})") from error


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
