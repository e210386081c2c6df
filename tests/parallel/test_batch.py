"""Which rows a process reads, on meshes whose devices belong to processes in any order."""

import types

import numpy as np
import pytest

from acejax.parallel.batch import parts_of


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
])
def test_a_process_reads_what_its_devices_hold(owners, shape, expected):
    mesh = mesh_of(owners, **shape)
    assert [parts_of(mesh, process) for process in range(max(owners) + 1)] == expected
