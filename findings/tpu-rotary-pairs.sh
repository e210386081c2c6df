#!/usr/bin/env bash
# Rotary positions by interleaved pairs, [..., 64, 2], cost a TPU more than a matrix product that swaps neighbours.
#
# jax 0.12.0.1 with libtpu 0.0.50.1 on a machine without a TPU, Python 3.12; the compiler's own estimates for v6e, 24
# heads of 128 and 4,608 tokens in bfloat16. An axis of 2 lies on 128 lanes; x cos + (x P) sin with P a constant signed
# permutation of 128 x 128 keeps the lanes full, though it multiplies 128 numbers for each one that it moves.
#
# Output seen:
#   by_pairs: 0.8 million cycles
#   by_product: 0.3 million cycles
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
from jax.sharding import SingleDeviceSharding

device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def by_pairs(x, cos, sin):  # cos and sin of each pair, [tokens, 1, 64]
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], 64, 2), -1, 0)
    turned = jnp.stack([cos * even - sin * odd, sin * even + cos * odd], -1)
    return turned.reshape(x.shape).astype(x.dtype)


def by_product(x, cos, sin):  # the same with each pair's twice, [tokens, 1, 128]
    swap = np.zeros((128, 128), np.float32)
    swap[1::2, ::2], swap[::2, 1::2] = -np.eye(64), np.eye(64)
    swapped = jnp.dot(x, jnp.asarray(swap, x.dtype), preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


for function, size in (by_pairs, 64), (by_product, 128):
    table = array(4608, 1, size, dtype=jnp.float32)
    text = jax.jit(function).lower(array(4608, 24, 128), table, table).compile().as_text()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("\nENTRY"):])))
    print(f"{function.__name__}: {cycles / 1e6:.1f} million cycles")
PYTHON
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
    "$folder/venv/bin/python" "$folder/case.py" >"$folder/found" 2>"$folder/log" || { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
