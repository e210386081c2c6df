#!/usr/bin/env bash
# A product with weights that are sharded over their inputs becomes a loop of partial products on TPUs by default.
#
# jax 0.12.0.1 with libtpu 0.0.50.1 on a machine without a TPU, Python 3.12; the compiler's own estimates for v6e, without
# what waits for other devices. Samples and weights over the same eight devices (fully sharded data parallel): the "windowed
# einsum" adds eight products over an eighth of the inputs into the result in memory. With the threshold of the option
# raised it is a gather and one product.
#
# Output seen:
#   by default: 4.5 million cycles, collective-permute, while
#   threshold raised: 0.7 million cycles, all-gather
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
import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
mesh = Mesh(np.array(devices), ("fsdp",))


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))


STEPS = 4  # of the loop: 8 parts, two at a time
x, w = array(8, 4608, 3072), array(3072, 12288)
for options in {}, {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}:
    text = jax.jit(lambda x, w: x @ w).lower(x, w).compile(options or None).as_text()
    cycles, name = collections.Counter(), ""
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            name = "entry" if opened[1] else opened[2]
        cycles[name] += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
    bodies = re.findall(r" while\(.*body=%([\w.\-]+)", text)
    total = cycles["entry"] + sum(STEPS * cycles[body] for body in bodies)
    kinds = sorted(set(re.findall(r" (all-gather|collective-permute|while)(?:-start)?\(", text)))
    print("by default:" if not options else "threshold raised:", f"{total / 1e6:.1f} million cycles,", ", ".join(kinds))
PYTHON
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
    "$folder/venv/bin/python" "$folder/case.py" >"$folder/found" 2>"$folder/log" || { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
