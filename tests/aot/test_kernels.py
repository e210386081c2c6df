"""Which kernel is compiled apart for a signature; with libtpu, that its schedule is found."""

import json
import os
import subprocess
import sys

import pytest

from acejax import aot
from acejax.aot import kernels
from tests.aot.libtpu import needs_libtpu


@pytest.mark.parametrize("signature, case", [
    ("attention_forward(s32[1], bf16[1,4608,3072], bf16[1,4608,3072], bf16[1,4608,3072])",
     ("attention", 1, 4608, 3072, 0, 4608)),
    ("norm_backward(bf16[2,512,384], f32[2,1,384], bf16[2,1,384], bf16[2,512,384])", ("norm", 2, 512, 384, 0, 512)),
    ("rotate_forward(bf16[1,4608,3072], f32[128], f32[1,4608,128])", ("rotate", 1, 4608, 3072, 0, 4608)),
    ("rotate_backward(bf16[1,512,3072], f32[1,4608,128])", ("rotate", 1, 512, 4096, 3072, 4608)),
    ("rotate_forward(bf16[1,4096,3072], f32[1,4608,128])", ("rotate", 1, 512, 4096, 3072, 4608)),
])
def test_what_is_compiled_for_a_signature(signature, case):
    assert kernels._case(signature) == [case]


def test_a_call_is_told_by_its_tokens_and_those_of_all():
    keys = [kernels._key(f"rotate_forward({shapes})") for shapes in (
        "bf16[1,512,3072], f32[1,4608,128]", "bf16[1,512,3072], f32[1,1536,128]", "bf16[1,4096,3072], f32[1,4608,128]")]
    assert len(set(keys)) == 3
    assert kernels._key("rotate_forward(bf16[1,512,3072], bf16[128], f32[1,4608,128])") == keys[0]  # a scale's dtype


@needs_libtpu
def test_a_schedule_of_each_kernel():
    calls = {"attention_forward(s32[1], bf16[1,1024,256], bf16[1,1024,256], bf16[1,1024,256])": 3}
    line = ("import json, sys; from acejax.aot import kernels; "
            "print(json.dumps(kernels.cycles(json.loads(sys.argv[1]), 'v6e:1x1', 'v6e')))")
    done = subprocess.run([sys.executable, "-c", line, json.dumps(calls)], env=os.environ | aot.ENVIRONMENT,
                          capture_output=True, text=True, check=True)
    (cycles,) = json.loads(done.stdout.splitlines()[-1]).values()
    products = 2 * 4 * 1024**2 * 128 / 2**19  # two heads, by what the matrix units make in a cycle
    assert products < cycles < 8 * products
