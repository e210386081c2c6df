"""`python -m tests.parallel.meshed DEVICES SHAPES`: what a mesh makes of models, against one device.

SHAPES is JSON, a list of meshes. A line of JSON for each mesh: by part, the greatest difference of any output in its
standard deviations, and how many collective-permutes may have swapped rows (`acejax.parallel.swaps`).
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={sys.argv[1]}"

import jax
import numpy as np
from jax.sharding import Mesh

import acejax
from acejax.adapt import lora as adapt
from acejax.adapt import quantize
from acejax.model import autoencoder, clip, t5
from acejax.model.config import AutoencoderConfig, CLIPConfig, Execution, T5Config
from acejax.parallel import rules
from acejax.parallel.swaps import swaps
from acejax.train.config import TrainConfig
from acejax.train.program import Program
from acejax.weights import keymaps
from tests import judges
from tests.goldens import cases
from tests.train import small

BATCH = IMAGE = TEXT = HEADS = 16  # each falls over any axis of a mesh of 16 devices
SHAPE = {"hidden_size": 128, "num_heads": HEADS, "axes_dim": (2, 2, 4), "depth": 2, "depth_single_blocks": 2,
         "context_in_dim": 32, "vec_in_dim": 32}
CONFIG = acejax.MMDiTConfig(**dict(small.make_config().model) | SHAPE)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=4, d_ff=64, num_layers=2, num_heads=8)
CLIP = CLIPConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  max_position_embeddings=16)
AUTOENCODER = AutoencoderConfig(ch=16, num_groups=8)
NORMAL = np.random.default_rng(0).standard_normal
Trees = dict[str, Any]
Made = tuple[Any, str]  # outputs, and the program that they come from


def drawn(*shape: int) -> np.ndarray:
    return NORMAL((BATCH, *shape)).astype(np.float32)


def tokens() -> acejax.Tokens:
    grid = np.indices((1, 4, IMAGE // 4)).reshape(3, -1).T.astype(np.int32)
    return acejax.Tokens(
        image=drawn(IMAGE, CONFIG.in_channels), positions=np.tile(grid, (BATCH, 1, 1)),
        text=drawn(TEXT, CONFIG.context_in_dim), pooled=drawn(CONFIG.vec_in_dim),
        sigma=np.linspace(0.1, 0.9, BATCH, dtype=np.float32), guidance=np.linspace(1, 4, BATCH, dtype=np.float32),
        lengths=np.arange(BATCH, dtype=np.int32) % IMAGE + 1)


def training_batch() -> dict[str, np.ndarray]:
    seen = tokens()
    return {name: drawn(IMAGE, 64) for name in ("edit", "modify", "target")} | {
        "mask": 255 * (drawn(IMAGE, 256) > 0).astype(np.uint8), "positions": seen.positions, "text": seen.text,
        "pooled": seen.pooled, "lengths": np.full(BATCH, IMAGE, np.int32), "task": np.zeros(BATCH, np.int32),
        "unit": np.full((BATCH, IMAGE), -1, np.int8)}


def trees() -> dict[str, Trees]:
    """The models' parameters, none of them 0, by part."""
    params = keymaps.from_foreign(CONFIG, cases.state(CONFIG).__getitem__, "bfl")
    lora = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.1 * NORMAL(x.shape).astype(np.float32) if path[-1].key == "b" else x,
        adapt.init(CONFIG, jax.random.key(1), 4))
    left, quant = quantize.quantize(params)
    others = {name: keymaps.from_foreign(config, cases.state(config, layout=layout).__getitem__, layout)
              for name, config, layout in (("t5", T5, "hf"), ("clip", CLIP, "hf"), ("autoencoder", AUTOENCODER, "bfl"))}
    return {"full": {"params": params}, "lora": {"params": params, "lora": lora},
            "int8": {"params": left, "quant": quant, "lora": lora}} | others


def execute(mesh: Mesh | None, function: Callable[..., Any], params: Trees, rows: Any, out: Any = None) -> Made:
    """A function of trees and rows on a mesh; `out` are the outputs' shardings."""
    if mesh is not None:
        params = jax.device_put(params, rules.shardings(params, mesh))
        rows = jax.device_put(rows, rules.batch_sharding(mesh))
    compiled = jax.jit(function, out_shardings=out).lower(params, rows).compile()
    return jax.device_get(compiled(params, rows)), compiled.as_text()


def gradient(mesh: Mesh | None, params: Trees, rows: Any, of: str) -> Made:
    """The velocity and the gradient of one of the trees."""
    execution = Execution(remat="full")
    if mesh is not None:
        execution = Execution(remat="full", constrain=rules.constrain(mesh), gather=rules.gather(mesh),
                              share=rules.share(mesh))

    def function(params: Trees, rows: Any) -> Any:
        seen, cotangent = rows

        def velocity(tree: Any) -> jax.Array:
            return acejax.apply(CONFIG, tokens=seen, execution=execution, **params | {of: tree})

        made, back = jax.vjp(velocity, params[of])
        return made, back(cotangent)[0]

    out = None if mesh is None else (rules.batch_sharding(mesh), rules.shardings(params[of], mesh))
    return execute(mesh, function, params, rows, out)


def fused(mesh: Mesh | None, params: Trees, rows: Any) -> Made:
    """Sizes of the gradient of a fused step, by its moments, and metrics of the next. Not the parameters: the first
    update has the gradient's sign alone, be it ever so small. A run on several devices refuses the step; it would be
    right."""
    config = small.make_config()
    config.model.update(SHAPE)
    config.optimizer.update({"name": "adafactor", "clip": 0.0, "learning_rate": 1e-2, "warmup": 0, "fused": True})
    config.execution.remat = "full"
    mesh = mesh or acejax.make_mesh(devices=jax.devices()[:1])
    program = Program.of(TrainConfig.of(config), mesh, references=0, tasks=1)
    state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), program.state)
    state = state.__class__(state.step, jax.device_put(params["params"], rules.shardings(params["params"], mesh)),
                            state.opt_state, state.ema, state.skipped)
    rows = jax.device_put(rows, rules.batch_sharding(mesh))
    compiled = program.step.lower(state, rows, frozen=program.frozen).compile()
    state, _ = compiled(state, rows, frozen=program.frozen)
    sizes = jax.tree.map(np.sqrt, jax.device_get(state.opt_state))
    _, metrics = compiled(state, rows, frozen=program.frozen)
    return (sizes, np.array([metrics["loss"], metrics["gradient_norm"]])), compiled.as_text()


def parts(params: dict[str, Trees]) -> Iterator[tuple[str, Callable[[Mesh | None], Made]]]:
    """Each part by its name, to be made on a mesh or None."""
    rows = tokens(), drawn(IMAGE, CONFIG.out_channels)
    for name, of in (("full", "params"), ("lora", "lora"), ("int8", "lora")):
        yield name, functools.partial(gradient, params=params[name], rows=rows, of=of)
    yield "fused", functools.partial(fused, params=params["full"], rows=training_batch())
    ids = np.random.default_rng(2).integers(2, 64, (BATCH, 16), np.int32)
    for name, function, inputs in (
            ("t5", functools.partial(t5.apply, T5), ids), ("clip", functools.partial(clip.apply, CLIP), ids),
            ("autoencoder", lambda params, rows: (autoencoder.encode(AUTOENCODER, params, rows[0]),
                                                  autoencoder.decode(AUTOENCODER, params, rows[1])),
             (drawn(16, 16, 3), drawn(2, 2, 16)))):
        yield name, functools.partial(execute, function=function, params=params[name], rows=inputs)


def difference(found: Any, expected: Any) -> float:
    """The greatest of all outputs; those that are one number throughout must be equal."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(judges.difference(one, other) if np.std(other) else float(np.abs(one - other).max())
               for one, other in pairs)


def main(devices: str, shapes: str, chosen: str = "") -> None:
    found = [{} for _ in json.loads(shapes)]
    for name, make in parts(trees()):
        if chosen and name not in chosen.split(","):
            continue
        expected, _ = make(None)
        for shape, result in zip(json.loads(shapes), found, strict=True):
            mesh = acejax.make_mesh(shape)
            outputs, program = make(mesh)
            result[name] = difference(outputs, expected), len(swaps(program, mesh.shape))
    for shape, result in zip(json.loads(shapes), found, strict=True):
        print(json.dumps({"shape": shape} | result))


if __name__ == "__main__":
    main(*sys.argv[1:])
