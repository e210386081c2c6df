"""Cycles of the TPU kernels, from the final schedule that libtpu writes of each.

A kernel's schedule has a bundle of instructions a cycle. Cycles of a call are the bundles of one step of its grid times
the steps: an upper estimate where parts run on some steps alone, as they are counted on all; waiting for memory is not
in it. libtpu writes schedules only where `LIBTPU_INIT_ARGS` asks for them before it starts, and then of everything that
it compiles: so the kernels are compiled apart from the program, in a process of their own.
"""

import functools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from acejax.aot import hlo
from acejax.errors import UserError

DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"


def cycles(calls: Mapping[str, int], topology: str, chip: str) -> dict[str, int]:
    """Cycles of one call of each kernel.

    Args:
      calls: a program's kernels by signature (`acejax.aot.hlo.Program`).
      topology: as libtpu names it, "v6e:2x4".
      chip: as `acejax.parallel.chips` names it.

    Raises:
      UserError: a kernel that does not compile, or that is none of ours.
    """
    wanted = sorted({shape for signature in calls for shape in _case(signature)})
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LIBTPU_INIT_ARGS": DUMP.format(folder), "JAX_PLATFORMS": "cpu"}
        child = subprocess.run([sys.executable, "-m", "acejax.aot.kernels", folder, topology, chip, json.dumps(wanted)],
                               env=environment, capture_output=True, text=True, check=False)
        if child.returncode:
            raise UserError(f"the kernels did not compile for {topology}: {child.stderr.strip().splitlines()[-1]}")
        found = json.loads(child.stdout.splitlines()[-1])
    missing = sorted(signature for signature in calls if str(_key(signature)) not in found)
    if missing:
        raise UserError(f"no schedule of the kernel {missing[0]}")
    return {signature: found[str(_key(signature))] for signature in calls}


def _case(signature: str) -> list[tuple[Any, ...]]:
    """What to compile for a kernel: (kind, samples, tokens, width, tokens before its own, tokens of all streams)."""
    name, _, rest = signature.partition("(")
    shapes = [tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", rest)]
    kind = name.split("_")[0]
    samples, tokens, width = next(shape for shape in shapes if len(shape) == 3)
    if kind != "rotate":
        return [(kind, samples, tokens, width, 0, tokens)]
    total = max(shape[1] for shape in shapes if len(shape) == 3)
    if total == tokens:
        return [(kind, samples, tokens, width, 0, total)]
    return [(kind, samples, *sorted((tokens, total - tokens)), width, total)]  # both streams are in one program


def main(folder: str, topology: str, chip: str, cases: str) -> None:
    """The other process: compiles each case and prints cycles by signature."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    here = SingleDeviceSharding(device)
    found = {}
    for case in json.loads(cases):
        function, shapes = _program(chip, *case)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
        for path in pathlib.Path(folder).iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        compiled = jax.jit(function).lower(*shapes).compile()
        steps = dict(_steps(jax.make_jaxpr(function)(*shapes).jaxpr))
        bundles = _bundles(pathlib.Path(folder))
        text = compiled.as_text()
        for signature in hlo.read(text).kernels:
            key = _key(signature)
            found[str(key)] = steps[key] * bundles[hlo.instruction_of(text, signature)]
    print(json.dumps(found))


def _program(chip: str, kind: str, samples: int, *sizes: int):
    """A function of one kernel's gradient and its abstract arguments."""
    import jax
    import jax.numpy as jnp

    from acejax.model.tpu import attention, norm, rotate

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def gradient(function, count):
        def summed(*arguments):
            return sum(jnp.sin(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(function(*arguments)))
        return jax.grad(summed, argnums=tuple(range(count)))

    if kind == "rotate":
        *streams, width, total = (size for size in sizes if size)
        table = array(samples, total, rotate.LANES, dtype=jnp.float32)
        scale = array(rotate.LANES, dtype=jnp.float32)
        made = tuple(rotate.Stream(*[array(samples, tokens, width)] * 3, scale, scale) for tokens in streams)
        return gradient(functools.partial(_rotated, rotate), 1), (made, table, table)
    tokens, width = sizes[:2]
    stream = array(samples, tokens, width)
    if kind == "norm":
        row = array(samples, 1, width)
        return gradient(norm.modulated_norm, 3), (stream, row, row)
    tiles = attention.tiles(chip, tokens)
    return gradient(lambda *arguments: attention.attend(*arguments, tiles), 3), (
        stream, stream, stream, array(samples, dtype=jnp.int32))


def _rotated(rotate, streams, cos, sin):
    return rotate.rotate(streams, cos, sin, 1.0)


def _steps(jaxpr) -> Iterator[tuple[tuple[Any, ...], int]]:
    """(key, steps of the grid) of each kernel in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            shapes = [value.aval.shape for value in equation.invars]
            yield _of(equation.params["name"], shapes), math.prod(equation.params["grid_mapping"].grid)
            continue
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, Sequence) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _steps(inner)


def _key(signature: str) -> tuple[Any, ...]:
    """What tells a kernel's calls apart, whatever the dtype of a scale: its name, its own tokens and those of all."""
    name, _, rest = signature.partition("(")
    return _of(name, [tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", rest)])


def _of(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
    streams = [shape for shape in shapes if len(shape) == 3]
    return name, streams[0], max(shape[1] for shape in streams)


def _bundles(folder: pathlib.Path) -> dict[str, int]:
    """Bundles by the instruction that the kernel is in the program."""
    found = {}
    for path in folder.glob("*schedule-analysis_final_bundles.txt"):
        named = re.match(r"\d+-(.*)-\d+-schedule-analysis", path.name)
        counted = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
        if named and counted:
            found[named[1]] = int(counted[1])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
