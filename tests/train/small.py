"""A training run small enough for tests: random features of three tasks, a two-block model, the demo's config."""

import numpy as np

from acejax.cli.config import folder
from acejax.data.schedule import Stage
from acejax.data.stream import Stream

MODEL = {"hidden_size": 32, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": (4, 6, 6),
         "context_in_dim": 8, "vec_in_dim": 8}
STEPS = 20
SIZES = ((4, 16), (8, 8), (12, 8))  # samples of a batch by number of tokens


class Table:
    """Random features in memory: task "a" and "b" without a reference, "r" with one, "s" with two."""

    tasks, datasets = ("a", "b", "r", "s"), ("small",)

    def __init__(self, count: int = 40):
        rng = np.random.default_rng(0)
        self.task = np.repeat(np.arange(4, dtype=np.int32), count)
        self.references = np.repeat([0, 0, 1, 2], count)
        self.dataset = np.zeros_like(self.task)
        self.tokens = 4 * (1 + self.references)
        self._rows = [self._row(rng, *pair) for pair in zip(self.task, self.references, strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self._rows[index]

    @staticmethod
    def _row(rng: np.random.Generator, task: int, references: int) -> dict[str, np.ndarray]:
        tokens, columns = 4 * (1 + references), 2 * (1 + references)
        latents = {name: rng.standard_normal((tokens, 64)).astype(np.float32) for name in ("edit", "modify", "target")}
        latents["target"] += 4  # there is something to learn in a few steps
        grid = np.indices((1, 2, columns)).reshape(3, -1).T.astype(np.int32)
        unit = np.tile(np.repeat([*range(references), -1], 2).astype(np.int8), 2)
        return latents | {"mask": 255 * rng.integers(0, 2, (tokens, 256)).astype(np.uint8), "positions": grid,
                          "unit": unit, "text": rng.standard_normal((3, 8)).astype(np.float32),
                          "pooled": rng.standard_normal(8).astype(np.float32), "task": task}


def make_config(batch_sizes: tuple[tuple[int, int], ...] = SIZES):
    """configs/demo.py with the tiny model, logging every step."""
    namespace = {}
    exec((folder() / "demo.py").read_text(), namespace)
    config = namespace["get_config"]()
    config.model.update(MODEL)
    config.update({"steps": STEPS, "watch": {"every": 1}, "checkpoint": {"every": 4},
                   "data": {"batch_sizes": batch_sizes}})
    return config


def make_stream(steps: int = STEPS, batch_sizes: tuple[tuple[int, int], ...] = SIZES) -> Stream:
    """Half of the steps without references."""
    stages = [Stage(steps // 2, {"a": 1, "b": 1}, 0), Stage(steps // 2, {"a": 1, "b": 1, "r": 1, "s": 1})]
    return Stream(Table(), stages, [tokens for tokens, _ in batch_sizes], dict(batch_sizes), seed=3)


def losses(workdir) -> list[float]:
    """The loss of each step, from metrics.jsonl."""
    import json
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
