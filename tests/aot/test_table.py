"""The compiler's report in words."""

import types

from acejax.aot import compiler, hlo
from acejax.aot.table import table

REPORT = compiler.Report(
    topology="v6e-8", versions={"jax": "0.12"}, options={}, compile_seconds=99.6, peak=29_000_000_000, limit=33.5e9,
    arguments=1, temporaries=1, cycles=800_000_000, kernels={
        "attention_forward(s32[1], bf16[1,4608,3072])": compiler.Kernel(57, 1_300_000)}, cores=1, clock=1.75e9,
    collectives={"all-gather": 34.48e9}, zero_gathers=5e9, top=(
        hlo.Operation("fusion.1", "bf16[4608,12288]", 87_410_000, 57, "model/mmdit.py:130", "jit(step)/mlp_in/dot"),))


def test_what_the_compiler_says():
    step = types.SimpleNamespace(flops=1785e12, memory=types.SimpleNamespace(total=29.29e9))
    told = table(REPORT.to_json(), step)
    assert "the compiler for v6e-8 says (jax 0.12; 100 s; estimates of one device, nothing was run):" in told
    assert "29.00 GB of 33.50 that it takes; the plan says 29.29 (+1.0%)" in told
    assert "874.1 million: 800.0 outside kernels, 74.1 in them" in told
    assert "0.499 at 1.75 GHz" in told and "; MFU 48.7%" in told
    assert "57 x   1.300 million  attention_forward s32[1]" in told
    assert "all-gather          34.480 GB" in told and "5.000 GB stand for gathers" in told
    assert "10.0%   57 x  1,533,508  model/mmdit.py:130" in told


def test_without_a_plan_there_is_no_mfu():
    assert "MFU" not in table(REPORT.to_json())
