"""`python -m tests.weights.mesh FILE`: load a transformer onto 8 virtual devices; memory figures as JSON."""

import json
import resource
import sys

import jax

jax.config.update("jax_num_cpu_devices", 8)

from acejax.parallel.mesh import make_mesh  # noqa: E402
from acejax.weights.load import load_mmdit  # noqa: E402


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(path: str) -> dict:
    """Bytes of the result, of the largest leaf and shard, and the growth of the process's peak while loading."""
    mesh = make_mesh({"fsdp": 8})
    jax.device_put(jax.numpy.zeros(8 * 1024), jax.sharding.NamedSharding(mesh, jax.P("fsdp"))).block_until_ready()
    before = peak()
    _, params = load_mmdit(path, mesh=mesh)
    leaves = jax.tree.leaves(params)
    return {"growth": peak() - before, "result": sum(shard.data.nbytes for leaf in leaves
                                                     for shard in leaf.addressable_shards),
            "leaf": max(leaf.nbytes for leaf in leaves),
            "shard": max(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
            "devices": len({shard.device for leaf in leaves for shard in leaf.addressable_shards}),
            "sharded": sum(leaf.nbytes for leaf in leaves if not leaf.sharding.is_fully_replicated)
            / sum(leaf.nbytes for leaf in leaves)}


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
