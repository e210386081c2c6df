"""Each entry of the table of tiles is compiled, forward and backward, for the chips that it is for."""

import json
import os
import subprocess
import sys

import pytest

from acejax import aot
from acejax.model.tpu import attention
from tests.aot.libtpu import needs_libtpu

TARGETS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "v7x": "tpu7x:1x1x1"}
FULL = 4608  # tokens that the largest tiles of every entry divide


def test_every_entry_is_for_a_chip_that_is_compiled_for():
    assert set(attention.CAPS) - {""} <= set(TARGETS)


@pytest.mark.parametrize("chip", TARGETS)
def test_the_largest_tiles_are_the_caps(chip):
    queries, keys, chunk, back_queries, back_keys, back_chunk, deep = attention.CAPS.get(chip, attention.CAPS[""])
    assert attention.tiles(chip, FULL) == attention.Tiles(
        queries, keys, chunk, back_queries, back_keys, back_chunk, deep)


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", pytest.param("v5p", marks=pytest.mark.soak), "v6e", "v7x"])  # v5p has v5e's
def test_an_entry_compiles(chip):
    calls = {f"attention_{way}(s32[1], {', '.join([f'bf16[1,{FULL},{attention.HEAD}]'] * count)})": 1
             for way, count in (("forward", 3), ("backward", 4))}
    line = ("import json, sys; from acejax.aot import kernels; "
            "print(json.dumps(kernels.cycles(json.loads(sys.argv[1]), *sys.argv[2:])))")
    done = subprocess.run([sys.executable, "-c", line, json.dumps(calls), TARGETS[chip], chip],
                          env=os.environ | aot.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cycles = json.loads(done.stdout.splitlines()[-1])
    assert set(cycles) == set(calls) and all(cycles.values())
