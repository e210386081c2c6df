"""`python -m tests.train.meshed WORKDIR STEPS MESHES [PORT PROCESS [SILENCE]]`: the small run on mesh after mesh.

MESHES is JSON, {name: mesh}; each is trained in WORKDIR/name. Where a mesh has "lora", one is trained on weights that
stay as they are, held as it says; where it has "optimizer", by that one. With PORT it is one of two processes of four
devices, without one process of as many as the meshes need.
"""

import json
import math
import os
import pathlib
import sys

if __name__ == "__main__":
    devices = 4 if len(sys.argv) > 4 else max(math.prod(size for size in mesh.values() if isinstance(size, int))
                                              for mesh in json.loads(sys.argv[3]).values())
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"

import jax
import numpy as np

import acejax
from acejax.data.schedule import Stage
from acejax.data.stream import Stream
from acejax.parallel import processes
from acejax.train.loop import train
from acejax.weights import keymaps
from acejax.workdir import lock
from tests.goldens import cases
from tests.train import small

MODEL = {"hidden_size": 64, "num_heads": 8, "axes_dim": (2, 2, 4)}  # heads for tensor x seq = 8
WIDE = {"hidden_size": 128, "axes_dim": (4, 4, 8)}  # that Adafactor keeps rows and columns of
SIZES = ((12, 8),)  # one bucket: one compile


class Table(small.Table):
    """With four text tokens, for seq = 4."""

    @staticmethod
    def _row(rng: np.random.Generator, task: int, references: int) -> dict[str, np.ndarray]:
        row = small.Table._row(rng, task, references)
        return row | {"text": rng.standard_normal((4, 8)).astype(np.float32)}


def weights(folder: pathlib.Path) -> pathlib.Path:
    """A file of weights, none of them 0."""
    model = acejax.MMDiTConfig(**dict(small.make_config().model) | MODEL)
    if jax.process_index() == 0:
        acejax.save_model(folder / "base.safetensors", model,
                          keymaps.from_foreign(model, cases.state(model).__getitem__, "bfl"))
    return folder / "base.safetensors"


def run(workdir: pathlib.Path, mesh: dict[str, int], steps: int) -> None:
    config = small.make_config(SIZES)
    config.model.update(MODEL)
    if base := (mesh := dict(mesh)).pop("lora", None):
        config.lora = {"rank": 4, "base": base}
        config.optimizer.learning_rate = 0.03  # half of the factors start at zero
        config.init_from = str(weights(workdir.parent))
    if optimizer := mesh.pop("optimizer", None):
        config.optimizer.name = optimizer
        config.model.update(WIDE)
    config.mesh.update({"data": 1} | mesh)
    config.steps = steps
    config.checkpoint.every = 3
    stream = Stream(Table(), [Stage(1)], [12], dict(SIZES), seed=3)
    with lock(workdir):
        train(config, workdir, stream)


def main(folder: str, steps: str, meshes: str, port: str | None = None, process: str = "0",
         silence: str = "60") -> None:
    several = {} if port is None else {"coordinator": f"localhost:{port}", "processes": 2, "process": int(process)}
    with processes.joined(**several, patience=60, silence=float(silence)):
        for name, mesh in json.loads(meshes).items():
            run(pathlib.Path(folder) / name, mesh, int(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
