"""A training run small enough for tests: random features of three tasks, a two-block model, the demo's config."""

import numpy as np

from acejax.cli.config import folder
from acejax.data.stream import Stage, Stream

MODEL = {"hidden_size": 32, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": (4, 6, 6),
         "context_in_dim": 8, "vec_in_dim": 8}
STEPS = 20


def make_config(batch_sizes: tuple[int, ...] = (16, 8, 8)):
    """configs/demo.py with the tiny model, logging every step."""
    namespace = {}
    exec((folder() / "demo.py").read_text(), namespace)
    config = namespace["get_config"]()
    config.model.update(MODEL)
    config.update({"steps": STEPS, "log_every": 1, "checkpoint_every": 4, "data": {"batch_sizes": batch_sizes}})
    return config


def make_stream(steps: int = STEPS, batch_sizes: tuple[int, ...] = (16, 8, 8)) -> Stream:
    """Task "a" and "b" without a reference, "r" with one, "s" with two."""
    rng = np.random.default_rng(0)
    tables = {}
    for task, references in (("a", 0), ("b", 0), ("r", 1), ("s", 2)):
        width = 4 * (references + 1)
        shape = (40, 4, width, 16)
        latents = {name: rng.standard_normal(shape).astype(np.float32) for name in ("edit", "modify", "target")}
        unit = np.repeat([*range(references), -1], 2).astype(np.int8)
        tables[task] = latents | {"mask": rng.integers(0, 2, (40, 32, 8 * width, 1)).astype(np.uint8),
                                  "unit": np.tile(unit, (40, 1)),
                                  "text": rng.standard_normal((40, 3, 8)).astype(np.float32),
                                  "pooled": rng.standard_normal((40, 8)).astype(np.float32)}
    stages = [Stage(steps // 2, {"a": 1, "b": 1}), Stage(steps // 2, {"a": 1, "b": 1, "r": 2, "s": 2})]
    return Stream(tables, stages, {4 * units: size for units, size in enumerate(batch_sizes, 1)}, seed=3)


def losses(workdir) -> list[float]:
    """The loss of each step, from metrics.jsonl."""
    import json
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
