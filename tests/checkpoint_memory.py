"""`python -m tests.checkpoint_memory WORKDIR MEGABYTES ORDER`: memory that a checkpoint takes, as JSON.

ORDER "save" lays float32 leaves over a mesh of 8 virtual devices; a dtype restores them in it, on another mesh.
"""

import json
import pathlib
import re
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

from jax.sharding import NamedSharding  # noqa: E402

from acejax.checkpoint import Checkpoints  # noqa: E402
from acejax.parallel.mesh import make_mesh  # noqa: E402

WIDTH = 1024


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak so far), in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def like(megabytes: int, axes: dict[str, int], spec: jax.P, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Eight leaves, one of them as large as the four smallest."""
    place = NamedSharding(make_mesh(axes), spec)
    rows = megabytes * 2**20 // (4 * WIDTH) // 8
    return {f"leaf{i}": jax.ShapeDtypeStruct((8 * (rows * (i + 4) // 64), WIDTH), dtype, sharding=place)
            for i in range(8)}


def growth(step) -> tuple[int, object]:
    """How far the peak rises above where it starts, and the step's result."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    made = step()
    return memory("VmHWM") - before, made


def save(workdir: str, megabytes: int) -> dict:
    wanted = like(megabytes, {"fsdp": 8}, jax.P("fsdp"), "float32")
    state = jax.jit(lambda: {name: jax.random.normal(jax.random.key(0), leaf.shape) for name, leaf in wanted.items()},
                    out_shardings={name: leaf.sharding for name, leaf in wanted.items()})()
    checkpoints = Checkpoints(workdir)
    jax.block_until_ready(state)

    def write() -> None:
        checkpoints.save(1, state)
        checkpoints.close()

    return {"state": sum(leaf.nbytes for leaf in state.values()), "save": growth(write)[0]}


def restore(workdir: str, megabytes: int, dtype: str) -> dict:
    wanted = like(megabytes, {"fsdp": 2, "tensor": 4}, jax.P("fsdp", "tensor"), dtype)
    checkpoints = Checkpoints(workdir)
    found, (_, state) = growth(lambda: checkpoints.restore(wanted))
    return {"state": sum(leaf.nbytes for leaf in state.values()), "restore": found}


if __name__ == "__main__":
    workdir, megabytes, order = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    json.dump(save(workdir, megabytes) if order == "save" else restore(workdir, megabytes, order), sys.stdout)
