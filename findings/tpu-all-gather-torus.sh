#!/usr/bin/env bash
# Over a whole TPU torus of three axes the compiler has no all-gather: it makes one of an all-reduce, of twice the bytes.
#
# jax 0.12.0.1 with libtpu 0.0.50.1 on a machine without a TPU, Python 3.12. Weights that are sharded over all devices and
# used whole (fully sharded data parallel) are gathered by an all-gather on v5p:2x2x4 and v5e:16x16, and on v5p:4x4x4 by
# an all-reduce over a buffer of zeros; so is a jax.lax.all_gather in shard_map. Over two axes of the torus and then over
# the third, on a mesh of 4 x 16, there are two all-gathers.
#
# Output seen:
#   v5p:2x2x4 (16,) ['all-gather']
#   v5p:4x4x4 (64,) ['all-reduce']
#   v5p:4x4x4 (4, 16) ['all-gather', 'all-gather']
#   v5e:16x16 (256,) ['all-gather']
#
# Exits 0 while this is so, 1 when it is not, 2 where the packages can't be installed.
set -u
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in ${PYTHON:-} python3.12 python3.13 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv" &&
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 \
        libtpu==0.0.50.1 || exit 2
cat >"$folder/case.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

for name, shape in ("v5p:2x2x4", (16,)), ("v5p:4x4x4", (64,)), ("v5p:4x4x4", (4, 16)), ("v5e:16x16", (256,)):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Mesh(np.array(devices).reshape(shape), ("x", "y")[:len(shape)])
    count = len(devices)

    def array(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, P(mesh.axis_names)))

    def product(x, w, mesh=mesh, shape=shape):
        for axes in (mesh.axis_names[:1], ())[2 - len(shape):]:  # the last axis first
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(axes or None)))
        return x @ w

    text = jax.jit(product).lower(array(count, 256, 128 * count), array(128 * count, 1024)).compile().as_text()
    print(name, shape, re.findall(r" (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text))
PYTHON
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
    "$folder/venv/bin/python" "$folder/case.py" >"$folder/found" 2>"$folder/log" || { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
