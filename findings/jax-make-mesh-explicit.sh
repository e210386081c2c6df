#!/usr/bin/env bash
# jax.make_mesh makes axes of another type than every other way to make a mesh, and the two do not mix.
#
# jax 0.10.2, one CPU device, no axis types given anywhere: jax.make_mesh gives Explicit axes; jax.sharding.Mesh,
# AbstractMesh and jax.experimental.topologies.make_mesh give Auto ones. So a program that compiles ahead of time for a
# topology's mesh can fail on jax.make_mesh of the same devices: a product whose contracted axis is sharded compiles for
# the first and is a ShardingTypeError for the second. Arrays on two such meshes of the same devices can't meet in one
# product: ValueError. jax 0.12.0.1 (VERSION=0.12.0.1 PYTHON=python3.12) does the same, but has changed sides with
# AbstractMesh, which is Explicit there.
#
# Output seen with jax 0.10.2:
#   jax.make_mesh Explicit
#   jax.sharding.Mesh Auto
#   jax.sharding.AbstractMesh Auto
#   topologies.make_mesh Auto
#   contracted axis sharded, Auto: compiles
#   contracted axis sharded, Explicit: ShardingTypeError
#   one of each: ValueError
#
# Exits 0 while this is so, 1 when it is not, 2 where the packages can't be installed.
set -u
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
version=${VERSION:-0.10.2}
"${PYTHON:-python3}" -m venv "$folder/venv" &&
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version" || exit 2
cat >"$folder/axes.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

made, plain = jax.make_mesh((1,), ("x",)), Mesh(np.array(jax.devices()), ("x",))
described = topologies.TopologyDescription(jax.devices())
for name, mesh in (("jax.make_mesh", made), ("jax.sharding.Mesh", plain),
                   ("jax.sharding.AbstractMesh", AbstractMesh((1,), ("x",))),
                   ("topologies.make_mesh", topologies.make_mesh(described, (1,), ("x",)))):
    print(name, *{kind.name for kind in mesh.axis_types})


def array(mesh, *spec):
    return jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


for name, left, right in (("contracted axis sharded, Auto", array(plain, None, "x"), array(plain, "x")),
                          ("contracted axis sharded, Explicit", array(made, None, "x"), array(made, "x")),
                          ("one of each", array(plain, "x"), array(made))):
    try:
        jax.jit(jnp.dot).lower(left, right).compile()
        print(f"{name}: compiles")
    except Exception as error:
        print(f"{name}: {type(error).__name__}")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/axes.py" >"$folder/found" || exit 1
cat "$folder/found"
abstract=Auto
[[ $version == 0.12.* ]] && abstract=Explicit
sed -n 's/^#   //p' "$0" | sed "s/AbstractMesh Auto/AbstractMesh $abstract/" | diff - "$folder/found" >/dev/null || exit 1
