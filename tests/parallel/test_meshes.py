"""What a model computes does not depend on the mesh: forward, gradients, adapters, fused step, encoders."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.counts import count
from tests.parallel.shapes import SWAPPING, meshes

ROOT = pathlib.Path(__file__).parents[2]

def results(devices: int, shapes: list[dict[str, int]]) -> list[dict]:
    done = subprocess.run([sys.executable, "-m", "tests.parallel.meshed", str(devices), json.dumps(shapes)], cwd=ROOT,
                          env=os.environ.copy(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(devices: int, shapes: list[dict[str, int]]) -> None:
    found = results(devices, shapes)
    assert [one.pop("shape") for one in found] == shapes
    for shape, one in zip(shapes, found, strict=True):
        assert set(one) == {"full", "lora", "int8", "fused", "t5", "clip", "autoencoder"}
        assert all(difference < 1e-4 for difference, _ in one.values()), (shape, one)
        one.pop("fused")  # refused on several devices; its one permute, of modulation's vector, changes no value
        assert all(swaps == 0 for _, swaps in one.values()), (shape, one)


def test_meshes_of_eight_devices():
    check(8, count([SWAPPING], meshes(8)))


@pytest.mark.long
def test_meshes_of_sixteen_devices():
    check(16, count([SWAPPING | {"data": 4}, SWAPPING | {"seq": 2}], meshes(16)))


def test_every_mesh_is_counted():
    assert len(meshes(8)) == 20 and len(meshes(16)) == 35
