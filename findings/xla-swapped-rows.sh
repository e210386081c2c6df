#!/usr/bin/env bash
# XLA's SPMD partitioner swaps rows of a matrix product, silently.
#
# jax 0.10.2 on 8 virtual CPU devices, mesh (data 2, fsdp 2, tensor 2), no flags but their number. x [16, 8] lies over
# ((data, fsdp), tensor), w [8, 8] over (tensor, fsdp), the result over ((data, fsdp), tensor). x @ w with w = the
# identity should be x; rows 4-7 and 8-11 come back swapped, with no error and no warning. The program has one
# collective-permute that exchanges devices 2 and 4, 3 and 5, and none back. With rows over (fsdp, data), all else the
# same, the product is right. The same holds for jax 0.12.0.1 (VERSION=0.12.0.1 PYTHON=python3.12).
#
# Output seen with both:
#   ('data', 'fsdp') [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
#   ('fsdp', 'data') [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
#
# Exits 0 while this is so, 1 when it is not, 2 where the packages can't be installed.
set -u
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
version=${VERSION:-0.10.2}
"${PYTHON:-python3}" -m venv "$folder/venv" &&
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==$version" "jaxlib==$version" || exit 2
cat >"$folder/swapped.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
x = np.arange(128, dtype=np.float32).reshape(16, 8)
for rows in ("data", "fsdp"), ("fsdp", "data"):
    over = NamedSharding(mesh, P(rows, "tensor"))
    inputs = jax.device_put(x, over), jax.device_put(np.eye(8, dtype=np.float32), NamedSharding(mesh, P("tensor", "fsdp")))
    product = np.asarray(jax.jit(jnp.dot, out_shardings=over)(*inputs))
    print(rows, [int(np.flatnonzero((x == row).all(1))[0]) for row in product])
PYTHON
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" "$folder/swapped.py" \
    >"$folder/found" || exit 1
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
