"""One figure's program of one checkout, compiled for TPUs that are not here; a process of its own for `benchmarks.tpu`.

    PYTHONPATH=CHECKOUT python -P tpu_side.py compile|kernels FIGURE FOLDER

`compile` writes `program.hlo.gz` and `memory.json` to the folder; `kernels` writes `kernels.json`: each Pallas kernel
of the program compiled alone, with the bundles of its final schedule and the steps of its grid. Kernels are taken from
the program's jaxpr as they are there, so that nothing need be known of them, and mapped axes are in their grids. A
kernel that another figure has had is found in `kernels` beside the folder.

Only what every checkout since the first has is called here; where one has more (`hasattr`), it is used.
"""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from acejax.model import mmdit, modulation
from acejax.model.config import Execution, MMDiTConfig
from acejax.parallel import mesh as meshes
from acejax.parallel import rules

IMAGE, TEXT = 4096, 512  # tokens of a sample
SIDE = 128  # latents of a picture of as many image tokens
HEADS, HEAD = 24, 128
BLOCKS = 5  # of a stack, where not all are compiled
TARGETS = {"v6e-1": "v6e:1x1", "v6e-8": "v6e:2x4", "v5p-1": "v5p:1x1x1", "v5p-128": "v5p:4x4x4", "v5e-1": "v5e:1x1",
           "v5e-256": "v5e:16x16"}
CONFIGS = {"full": "ace_plus.py", "lora": "flux_fill_lora.py"}
SETTINGS = {"full": (), "lora": ("--config.lora.base=int8",)}


def devices(topology: str) -> list[jax.Device]:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[topology]).devices)


def has(module: str) -> bool:
    """Whether the checkout has a module of the package."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor what it would be in
        return False


def execution(topology: str, mesh: Mesh | None) -> Execution:
    """As training and editing have it in bfloat16, with the fast attention of a TPU."""
    if mesh is not None and has("acejax.parallel.kernels"):
        from acejax.parallel import kernels
        return kernels.on_devices(Execution(jnp.bfloat16), MMDiTConfig.ace_plus_fft(), mesh)
    chosen = Execution.for_platform("tpu")
    if any(field.name == "chip" for field in dataclasses.fields(Execution)):
        chosen = dataclasses.replace(chosen, chip=topology.split("-")[0])
    if mesh is None:
        return chosen
    return dataclasses.replace(chosen, constrain=rules.constrain(mesh), share=rules.share(mesh))


def placed(tree, where):
    """ShapeDtypeStructs with shardings: one for all leaves, or a tree of them."""
    if not isinstance(where, dict):
        where = jax.tree.map(lambda leaf: where, tree)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree,
                        where)


def attention(topology: str, part: str):
    """Of a layer of one sample, forward and backward; its arguments in the layout that the model calls it with."""
    from acejax.model.attention import attention as by_name

    here = SingleDeviceSharding(devices(topology)[0])
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=here)
    tokens = IMAGE + TEXT
    if not has("acejax.model.tpu.attention"):
        def attend(query, key, value, lengths):
            return by_name(query, key, value, lengths, "splash")
        shape = (1, tokens, HEADS, HEAD)
    else:
        from acejax.model.tpu import attention as kernel
        from acejax.model.tpu import rotate as turning
        tiles = kernel.tiles(topology.split("-")[0], kernel.padded(tokens))

        def attend(query, key, value, lengths):
            return kernel.attend(query, key, value, lengths, tiles)
        shape = (1, tokens, HEADS * HEAD)
        if part == "rotate":
            return rotate(turning, kernel.GAIN, here)

    def both(query, key, value, lengths, gradient):
        out, back = jax.vjp(lambda *heads: attend(*heads, lengths), query, key, value)
        return out, back(gradient)

    heads = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
    return jax.jit(both), (heads, heads, heads, lengths, heads), None


def rotate(turning, gain: float, here):
    """What prepares queries and keys of one stream, forward and backward."""
    tokens, width = IMAGE + TEXT, HEADS * HEAD

    def both(streams, cos, sin, gradient):
        out, back = jax.vjp(lambda streams: turning.rotate(streams, cos, sin, gain), streams)
        return out, back(gradient)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    heads, table, scale = array(1, tokens, width), array(1, tokens, HEAD, dtype=jnp.float32), array(
        HEAD, dtype=jnp.float32)
    return jax.jit(both), ((turning.Stream(heads, heads, heads, scale, scale),), table, table, (heads,) * 3), None


def step(topology: str, kind: str):
    """The training step of a config, one sample a device."""
    from acejax.cli import plan as command
    from acejax.cli.config import folder, parse_config
    from acejax.train.config import TrainConfig
    from acejax.train.plan_compile import abstract_batch
    from acejax.train.program import Program

    named = f"--config={folder() / CONFIGS[kind]}:{topology}"
    _, config = parse_config("plan", [named, *SETTINGS[kind]], command._define)
    run = TrainConfig.of(config)
    mesh = meshes.make_mesh(run.mesh, devices(topology))
    program = Program.of(run, mesh, references=1, tasks=8)
    batch = abstract_batch(run.model, rules.batch_parts(mesh, run.optimizer.accumulate), IMAGE, TEXT)
    batch = placed(batch, rules.batch_sharding(mesh))
    return program.step, (program.state, batch), {"frozen": program.frozen}


def blocks(topology: str, part: str):
    """The forward pass of few blocks, as a training step has it: parameters in float32 over fsdp."""
    del part
    mesh = meshes.make_mesh({"fsdp": -1}, devices(topology))
    config = dataclasses.replace(MMDiTConfig.ace_plus_fft(), depth=BLOCKS, depth_single_blocks=BLOCKS)
    how = dataclasses.replace(execution(topology, mesh), remat="full")
    params = jax.eval_shape(lambda key: mmdit.init(config, key), jax.random.key(0))
    params = placed(params, rules.shardings(params, mesh))
    tokens = mmdit.example(config, rules.batch_parts(mesh), IMAGE, TEXT, jnp.bfloat16)
    tokens = placed(tokens, rules.batch_sharding(mesh))
    return jax.jit(lambda params, tokens: mmdit.apply(config, params, tokens, execution=how),
                   **compiler_options()), (params, tokens), None


def compiler_options() -> dict:
    """What the checkout compiles a training step for a TPU with."""
    if not has("acejax.parallel.options"):
        return {}
    from acejax.parallel.options import options
    return {"compiler_options": options("tpu")}


def picture(topology: str, part: str):
    """A step of the sampler's loop: one picture, parameters in bfloat16, the modulation made before.

    The loop runs from one step to another that are arguments, so the program has one trip as far as can be read off it.
    """
    from acejax import flow
    from acejax.edit import sampler

    axes = dict(item.split("=") for item in part.split(",")) if part else {}
    chosen = devices(topology)
    mesh = meshes.make_mesh({axis: int(size) for axis, size in axes.items()}, chosen) if part else None
    config, how = MMDiTConfig.ace_plus_fft(), execution(topology, mesh)
    row = SingleDeviceSharding(chosen[0]) if mesh is None else rules.batch_sharding(mesh)
    every = row if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    params = jax.eval_shape(lambda key: mmdit.init(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    sigmas = jax.eval_shape(lambda: flow.schedule(2, IMAGE))
    made = jax.eval_shape(lambda params, sigmas: modulation.modulations(
        config, params, sigmas[:-1, None], jnp.zeros((1, config.vec_in_dim)), jnp.zeros(1), execution=Execution(
            jnp.bfloat16)), params, sigmas)
    _, rest = sampler.split({"params": params, "quant": None, "lora": None})
    if hasattr(sampler, "parts_first"):  # as `Sampler` holds them on a TPU
        rest = {name: tree and jax.eval_shape(sampler.parts_first, tree) for name, tree in rest.items()}
    rest = placed(rest, row) if mesh is None else {name: tree and placed(tree, rules.shardings(tree, mesh))
                                                    for name, tree in rest.items()}
    latents = array(1, SIDE, SIDE, 16)
    features = {"edit": latents, "modify": latents, "noise": latents, "mask": array(1, 8 * SIDE, 8 * SIDE, 1),
                "text": array(1, TEXT, config.context_in_dim, dtype=jnp.bfloat16)}
    arguments = (config, how, None, rest, placed(features, row), placed(sigmas, every), placed(made, every),
                 placed(array(2, dtype=jnp.int32), every))
    return sampler._loop, arguments, None


FIGURES = {
    **{f"attention {chip}": (attention, f"{chip}-1", "") for chip in ("v6e", "v5p", "v5e")},
    **{f"rotate {chip}": (attention, f"{chip}-1", "rotate") for chip in ("v6e", "v5p", "v5e")},
    **{f"full {topology}": (step, topology, "full") for topology in ("v6e-8", "v5p-128", "v5e-256")},
    "single block v6e-8": (blocks, "v6e-8", ""),
    "picture v6e-1": (picture, "v6e-1", ""),
    **{f"lora {topology}": (step, topology, "lora") for topology in ("v6e-1", "v6e-8")},
    **{f"picture v6e-8 {axes}": (picture, "v6e-8", axes)
       for axes in ("tensor=8", "seq=8", "tensor=2,seq=4", "tensor=4,seq=2")},
}


def main(mode: str, name: str, folder: str) -> None:
    make, topology, part = FIGURES[name]
    function, arguments, named = make(topology, part)
    if mode == "compile":
        compile_whole(function, arguments, named or {}, pathlib.Path(folder))
    else:
        traced = function.trace(*arguments, **(named or {}))
        found = list(kernels(traced.jaxpr.jaxpr, devices(topology)[0], pathlib.Path(folder).parent / "kernels"))
        pathlib.Path(folder, "kernels.json").write_text(json.dumps(found))


def compile_whole(function, arguments, named, folder: pathlib.Path) -> None:
    started = time.perf_counter()
    lowered = function.lower(*arguments, **named)
    between = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    memory = compiled.memory_analysis()
    report = {name: getattr(memory, f"{name}_in_bytes") for name in ("peak_memory", "argument_size", "temp_size")}
    report |= {"lower_seconds": round(between - started, 1), "compile_seconds": round(ended - between, 1)}
    (folder / "program.hlo.gz").write_bytes(gzip.compress(compiled.as_text().encode(), 5))
    (folder / "memory.json").write_text(json.dumps(report))


def kernels(jaxpr, device: jax.Device, kept: pathlib.Path):
    """Of each different kernel of a program: the text of a program of it alone, its grid's steps, and bundles by name
    of the instruction. LIBTPU_INIT_ARGS names the folder of schedules."""
    schedules = pathlib.Path(re.search(r"--xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])[1])
    kept.mkdir(exist_ok=True)
    seen = set()
    for equation in equations(jaxpr):
        lowered = alone(equation, SingleDeviceSharding(device))
        text = f"{device.device_kind} {jax.__version__} {device.client.platform_version} {lowered.as_text()}"
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key in seen:
            continue
        seen.add(key)
        if not (path := kept / f"{key}.json").is_file():
            for old in schedules.iterdir():
                old.unlink() if old.is_file() else shutil.rmtree(old)
            compiled = lowered.compile()
            name = equation.params.get("name") or equation.params["name_and_src_info"].name
            path.write_text(json.dumps({
                "name": name, "steps": math.prod(equation.params["grid_mapping"].grid), "text": compiled.as_text(),
                "bundles": bundles(schedules)}))
        yield json.loads(path.read_text())


def alone(equation, here) -> jax.stages.Lowered:
    arguments = [jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype, sharding=here) for value in equation.invars]

    def run(*values):
        return equation.primitive.bind(*values, **equation.params)

    return jax.jit(run).lower(*arguments)


def equations(jaxpr):
    """All kernels of a program, as often as they are written in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def bundles(folder: pathlib.Path) -> dict[str, int]:
    found = {}
    for path in folder.glob("*schedule-analysis_final_bundles.txt"):
        named = re.match(r"\d+-(.*)-\d+-schedule-analysis", path.name)
        counted = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
        if named and counted:
            found[named[1]] = int(counted[1])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
