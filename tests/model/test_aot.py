"""The 12B model is compiled ahead of time on a small machine, from abstract values alone."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# A CPU multiplies bfloat16 matrices in float32, and XLA's loop-invariant code motion then converts the weights of all
# layers ahead of the scan: 49 GB of temporaries that no GPU or TPU program has. Without that pass one layer is
# converted at a time, and the figure is the program's own.
FORWARD = textwrap.dedent("""
    import functools, json, pathlib, re, sys, time
    import jax
    import jax.numpy as jnp
    import acejax
    from acejax.model.mmdit import example

    config, execution = acejax.MMDiTConfig.ace_plus_fft(), acejax.Execution(jnp.bfloat16, attention="xla_chunked")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
                          jax.eval_shape(acejax.init, config, jax.random.key(0)))
    tokens = example(config, batch=1, image=4096, text=512, dtype=jnp.bfloat16)
    start = time.perf_counter()
    lowered = jax.jit(functools.partial(acejax.apply, config, execution=execution)).lower(params, tokens)
    traced = time.perf_counter()
    memory = lowered.compile({"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}).memory_analysis()
    status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
    json.dump({
        "trace seconds": traced - start,
        "compile seconds": time.perf_counter() - traced,
        "process peak": 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": lowered.out_info.shape,
    }, sys.stdout)
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_12b_forward_compiles_in_little_memory():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    run = subprocess.run([sys.executable, "-c", FORWARD], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    print("12B forward:", found)
    assert found["output"] == [1, 4096, 64]
    assert found["arguments"] > 23.8e9  # 11.9 B parameters in bfloat16
    assert found["process peak"] < 6e9
    assert found["temporaries"] < 3e9
