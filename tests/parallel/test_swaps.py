"""The swap of rows that XLA makes of batches over (data, fsdp), and that its sign in a compiled program is known."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from acejax.parallel.swaps import swaps

ROOT = pathlib.Path(__file__).parents[2]
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}

# XLA is wrong here: should these rows be right one day, `swaps` and the order of BATCH_AXES have lost their reason.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import acejax
from acejax.parallel.swaps import swaps
mesh = acejax.make_mesh(json.loads(sys.argv[1]))
x, w = np.arange(128.0).reshape(16, 8), np.eye(8)
for order in ("data", "fsdp"), ("fsdp", "data"):
    rows = jax.device_put(x, NamedSharding(mesh, P(order, "tensor")))
    kernel = jax.device_put(w, NamedSharding(mesh, P("tensor", "fsdp")))
    program = jax.jit(jnp.dot, out_shardings=rows.sharding).lower(rows, kernel).compile()
    same = np.asarray(program(rows, kernel)) == x
    print(json.dumps([bool(same.all()), len(swaps(program.as_text(), mesh.shape))]))
"""


@pytest.mark.parametrize("data", [2, 4])
def test_the_swap_is_there_and_is_seen(data):
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 * data}", "PYTHONPATH": str(ROOT)}
    shape = json.dumps(MIXED | {"data": data})
    done = subprocess.run([sys.executable, "-c", SCRIPT, shape], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[False, 1], [True, 0]]


V6E = ("  %collective-permute-start.1 = (bf16[64,512]{1,0:T(8,128)(2,1)S(1)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}, "
       "u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%copy-done), channel_id=1, source_target_pairs={PAIRS}, "
       'metadata={op_name="jit(dot)/dot_general"}')
CPU = "ROOT %collective-permute = f32[2,8]{1,0} collective-permute(%param), channel_id=1, source_target_pairs={PAIRS}"


@pytest.mark.parametrize("pairs, shape, seen", [
    ("{0,0},{2,4},{4,2},{6,6},{1,1},{3,5},{5,3},{7,7}", MIXED, True),
    ("{3,5},{5,3},{2,4},{4,2}", MIXED, True),  # those that stay need not be named
    ("{0,0},{2,4},{4,8},{6,12},{8,2},{10,6},{12,10},{14,14},{1,1},{3,5},{5,9},{7,13},{9,3},{11,7},{13,11},{15,15}",
     {"data": 4, "fsdp": 2, "tensor": 2}, True),
    ("{2,4},{4,2}", MIXED, False),  # on one half of `tensor` alone
    ("{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}", MIXED, False),  # a ring over `data`
    ("{0,0},{1,2},{4,4},{5,6},{2,1},{3,3},{6,5},{7,7}", MIXED, False),  # fsdp for tensor: no rows between data
    ("{2,4},{4,2},{3,5},{5,3}", {"fsdp": 4, "tensor": 2}, False),  # one batch axis has one order
    ("{1,2},{2,4},{3,6},{4,1},{5,3},{6,5}", {"data": 4, "fsdp": 2}, False),  # nothing over `tensor`: a gather's indices
])
def test_the_sign_in_the_text_of_cpu_and_tpu_programs(pairs, shape, seen):
    for line in (V6E, CPU):
        text = "HloModule jit_dot\n" + line.replace("PAIRS", pairs) + "\n  %other = f32[2] add(%a, %b)\n"
        assert len(swaps(text, shape)) == seen
