#!/usr/bin/env bash
# A sum over the rows of a bfloat16 matrix costs the TPU compiler 29 times what a matrix product with ones costs.
#
# jax 0.12.0.1 with libtpu 0.0.50.1 on a machine without a TPU, Python 3.12; the compiler's own estimates for v6e. It is
# the gradient of every bias: 4,608 tokens of 3,072 features. A product with one row of ones is turned into the sum again,
# one with eight rows is not.
#
# Output seen:
#   y.sum(0): 290 thousand cycles
#   ones((1, n)) @ y: 321 thousand cycles
#   ones((8, n)) @ y: 10 thousand cycles
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
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
y = jax.ShapeDtypeStruct((4608, 3072), jnp.bfloat16, sharding=SingleDeviceSharding(device))
for name, function in {
    "y.sum(0)": lambda y: y.sum(0),
    "ones((1, n)) @ y": lambda y: jnp.ones((1, 4608), y.dtype) @ y,
    "ones((8, n)) @ y": lambda y: jnp.ones((8, 4608), y.dtype) @ y,
}.items():
    text = jax.jit(function).lower(y).compile().as_text()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("\nENTRY"):])))
    print(f"{name}: {cycles // 1000} thousand cycles")
PYTHON
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
    "$folder/venv/bin/python" "$folder/case.py" >"$folder/found" 2>"$folder/log" || { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
