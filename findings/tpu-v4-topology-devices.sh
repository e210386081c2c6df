#!/usr/bin/env bash
# jax's description of a TPU v4 topology has two devices a chip, of which jax makes no mesh; v4 itself has one.
#
# jax 0.12.0.1 with libtpu 0.0.50.1 on a machine without a TPU, Python 3.12. get_topology_desc("v4:2x2x1") has 8 devices
# for 4 chips, one for each TensorCore, and topologies.make_mesh of it is an AssertionError (one device per chip,
# "megacore" mode). With chip_config_name="megacore", which no documentation names, it has 4 devices of 2 cores, of which
# a mesh is made. v5p, whose chips have two cores too, needs nothing of that.
#
# Output seen:
#   v4:2x2x1 {}: 8 devices of 1 cores, AssertionError
#   v4:2x2x1 {'chip_config_name': 'megacore'}: 4 devices of 2 cores, mesh of 4
#   v5p:2x2x1 {}: 4 devices of 2 cores, mesh of 4
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
cat >"$folder/devices.py" <<'PYTHON'
from jax.experimental import topologies

for name, more in ("v4:2x2x1", {}), ("v4:2x2x1", {"chip_config_name": "megacore"}), ("v5p:2x2x1", {}):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    count = len(topology.devices)
    try:
        mesh = f"mesh of {topologies.make_mesh(topology, (count,), ('x',)).size}"
    except AssertionError:
        mesh = "AssertionError"
    print(f"{name} {more}: {count} devices of {topology.devices[0].num_cores} cores, {mesh}")
PYTHON
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 "$folder/venv/bin/python" "$folder/devices.py" \
    >"$folder/found" 2>"$folder/log" || { tail -3 "$folder/log" >&2; exit 1; }
cat "$folder/found"
sed -n 's/^#   //p' "$0" | diff - "$folder/found" >/dev/null || exit 1
