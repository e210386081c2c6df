"""`python -m tests.parallel.slices`: meshes of TPU topologies, for a Python that has libtpu; needs no TPU.

Two slices make the mesh that jax's `create_hybrid_device_mesh` makes; one slice the mesh of `jax.make_mesh`, and one
where that has none, as each of its axes would need a part of the network's.
"""

import os

from acejax import aot

if __name__ == "__main__":
    os.environ.update(aot.ENVIRONMENT)  # before jax starts

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils, topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import acejax
from acejax import UserError
from acejax.parallel import rules
from acejax.parallel.mesh import AXES


def devices(name: str, slices: int = 1, **more) -> list[jax.Device]:
    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several, **more).devices


def main() -> None:
    for name, slices, shape in (("v6e:2x2", 2, (2, 4, 1, 1)), ("v6e:2x2", 2, (4, 1, 2, 1)),
                                ("v5e:4x4", 2, (2, 4, 4, 1)), ("v5p:2x2x2", 2, (2, 8, 1, 1))):
        chosen = devices(name, slices)
        mesh = acejax.make_mesh(dict(zip(AXES, shape, strict=True)), chosen)
        theirs = mesh_utils.create_hybrid_device_mesh((shape[0] // slices, *shape[1:]), (slices, 1, 1, 1), chosen)
        assert (mesh.devices == theirs).all(), (name, shape)
    for name, shape in (("v6e:2x4", (1, 8, 1, 1)), ("v6e:2x4", (2, 2, 2, 1)), ("v5e:16x16", (2, 128, 1, 1)),
                        ("v5p:4x4x4", (4, 16, 1, 1))):
        chosen = devices(name)
        mesh = acejax.make_mesh(dict(zip(AXES, shape, strict=True)), chosen)
        assert (mesh.devices == jax.make_mesh(shape, AXES, devices=chosen).devices).all(), (name, shape)
    for name, shape in (("v6e:4x4", {"data": 2, "fsdp": 8}), ("v5p:4x4x4", {"data": 8, "fsdp": 8})):
        acejax.make_mesh(shape, devices(name))
    try:
        acejax.make_mesh({"fsdp": -1}, devices("v6e:2x2", 2))
    except UserError as error:
        assert "data is 1 on 2 slices" in str(error)
    else:
        raise AssertionError("fsdp lies over the slow network")
    try:
        acejax.make_mesh({"fsdp": -1}, devices("v4:2x2x1"))
    except UserError as error:
        assert "megacore" in str(error)
    assert acejax.make_mesh({"fsdp": -1}, devices("v4:2x2x1", chip_config_name="megacore")).shape["fsdp"] == 4
    mesh = acejax.make_mesh({"data": 2, "fsdp": -1}, devices("v6e:2x2", 2))
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=rules.batch_sharding(mesh))
    w = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    jax.jit(jnp.dot, out_shardings=rules.batch_sharding(mesh)).lower(x, w).compile()


if __name__ == "__main__":
    main()
