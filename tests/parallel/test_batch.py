"""Which rows a process reads, on meshes whose devices belong to processes in any order."""

import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from acejax.parallel.batch import parts_of

ROOT = pathlib.Path(__file__).parents[2]


def mesh_of(owners: list[int], **shape: int):
    """A mesh over devices of these processes, in this order."""
    shape = {"data": 1, "fsdp": 1, "tensor": 1, "seq": 1} | shape
    devices = np.array([types.SimpleNamespace(process_index=owner) for owner in owners], object)
    return types.SimpleNamespace(shape=shape, devices=devices.reshape(list(shape.values())))


@pytest.mark.parametrize("owners, shape, expected", [
    ([0, 0, 0, 0, 1, 1, 1, 1], {"fsdp": 8}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ([0, 0, 0, 0, 1, 1, 1, 1], {"tensor": 8}, [(0,), (0,)]),  # replicas: both read all rows
    ([0, 0, 0, 0, 1, 1, 1, 1], {"tensor": 2, "seq": 4}, [(0,), (0,)]),
    ([0, 1, 0, 1, 0, 1, 0, 1], {"fsdp": 4, "tensor": 2}, [(0, 1, 2, 3), (0, 1, 2, 3)]),
    ([0, 0, 1, 1, 2, 2, 3, 3], {"data": 2, "seq": 4}, [(0,), (0,), (1,), (1,)]),
    ([0, 1, 1, 0], {"data": 2, "fsdp": 2}, [(0, 3), (1, 2)]),  # not neighbours
    ([0, 0, 1, 1], {"data": 2, "fsdp": 2}, [(0, 2), (1, 3)]),  # parts are counted along `data` first
    ([0, 0, 0, 0, 1, 1, 1, 1], {"data": 2, "fsdp": 2, "tensor": 2}, [(0, 2), (1, 3)]),
])
def test_a_process_reads_what_its_devices_hold(owners, shape, expected):
    mesh = mesh_of(owners, **shape)
    assert [parts_of(mesh, process) for process in range(max(owners) + 1)] == expected


SCRIPT = """
import jax, numpy as np
import acejax
from acejax.parallel import batch, rules
from tests.parallel.test_batch import mesh_of
rows = np.arange(32).reshape(16, 2)
for shape in ({"data": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
              {"data": 2, "fsdp": 2, "seq": 2}, {"tensor": 8}):
    mesh = acejax.make_mesh(shape)
    there = batch.to_mesh(mesh, {"rows": rows})["rows"]
    assert (np.asarray(there) == rows).all(), shape
    sharing = mesh_of([device.id for device in mesh.devices.flat], **shape)  # as if each were a process
    count = rules.batch_parts(mesh)
    for shard in there.addressable_shards:
        (part,) = batch.parts_of(sharing, shard.device.id)
        assert (shard.data == rows.reshape(count, -1, 2)[part]).all(), (shape, shard.device)
"""


def test_a_batch_has_its_rows_in_order_and_a_device_those_that_its_process_reads():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
