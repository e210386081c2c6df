"""`python -m tests.weights.mesh FILE`: load a transformer onto 8 virtual devices; memory figures as JSON."""

import json
import pathlib
import re
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

from acejax.parallel.mesh import make_mesh  # noqa: E402
from acejax.weights.load import load_mmdit  # noqa: E402


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak so far), in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def main(path: str) -> dict:
    """Bytes of the result, of the largest leaf and shard, and how far the process's peak rose above its start."""
    mesh = make_mesh({"fsdp": 8})
    jax.device_put(jax.numpy.zeros(8 * 1024), jax.sharding.NamedSharding(mesh, jax.P("fsdp"))).block_until_ready()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    _, params = load_mmdit(path, mesh=mesh)
    leaves = jax.tree.leaves(params)
    return {"growth": memory("VmHWM") - before, "result": sum(shard.data.nbytes for leaf in leaves
                                                     for shard in leaf.addressable_shards),
            "leaf": max(leaf.nbytes for leaf in leaves),
            "shard": max(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
            "devices": len({shard.device for leaf in leaves for shard in leaf.addressable_shards}),
            "sharded": sum(leaf.nbytes for leaf in leaves if not leaf.sharding.is_fully_replicated)
            / sum(leaf.nbytes for leaf in leaves)}


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
