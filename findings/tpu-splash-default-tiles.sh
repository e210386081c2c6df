#!/usr/bin/env bash
# jax's splash attention without block_sizes takes tiles of 128: about eleven times the cycles of tiles of 1,536.
#
# jax 0.12.0.1 with libtpu 0.0.50.1 on a machine without a TPU, Python 3.12: bundles of the kernel's final schedule times
# the steps of its grid, for v6e, 24 heads of 128, 4,608 tokens, forward. Waiting for memory is not in it.
#
# Output seen:
@OUT@
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
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import SingleDeviceSharding

folder, size, heads = pathlib.Path(sys.argv[1]), 4608, 24
device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
x = jax.ShapeDtypeStruct((heads, size, 128), jnp.bfloat16, sharding=SingleDeviceSharding(device))
mask = splash.MultiHeadMask([splash.FullMask((size, size))] * heads)
for block, sizes in (128, None), (1536, splash.BlockSizes(block_q=1536, block_kv=1536, block_kv_compute=512)):
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    for path in folder.iterdir():
        path.unlink()
    jax.jit(kernel).lower(x, x, x).compile()
    (path,) = folder.glob("*splash_mha_fwd*schedule-analysis_final_bundles.txt")
    bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())[1])
    cycles = bundles * heads * (size // block) ** 2
    print("block_sizes=None:" if sizes is None else "blocks of 1,536:", f"{cycles / 1e6:.1f} million cycles")
PYTHON
mkdir "$folder/dump"
LIBTPU_INIT_ARGS="--xla_jf_dump_to=$folder/dump --xla_jf_dump_llo_text=true" JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
    "$folder/venv/bin/python" "$folder/case.py" "$folder/dump" >"$folder/found" 2>"$folder/log" || { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
