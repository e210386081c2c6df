"""Meshes over several slices, over devices that do not say what they are part of, and meshes that others made."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import acejax
from acejax import UserError
from acejax.parallel import rules
from acejax.parallel.mesh import AXES, abstract_mesh
from acejax.weights import keymaps
from tests.aot.libtpu import needs_libtpu
from tests.goldens import cases

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Device:
    """As jax describes one, of a slice of two by two chips."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        return [self.id % 2, self.id % 4 // 2, 0]


class Square(Device):
    """Four by four."""

    @property
    def coords(self):
        return [self.id % 4, self.id // 4, 0]


def devices(*slices, **kind):
    return [Device(number, place, **kind) for number, place in enumerate(slices)]


def slices_of(mesh):
    """Which slice each place of the mesh's four axes lies in."""
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}, {"data": -1},
                                   {"data": 2, "fsdp": 2, "seq": 2}])
def test_data_alone_lies_over_slices(shape):
    """TPUs tell their slice, in whatever order they are listed."""
    mesh = acejax.make_mesh(shape, devices(1, 1, 1, 1, 0, 0, 0, 0))
    assert mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto} and len(set(mesh.devices.flat)) == 8
    data = mesh.shape["data"]
    for place, part in enumerate(slices_of(mesh)):
        assert set(part.flat) == {place * 2 // data}


def test_gpus_are_one_slice_until_told_otherwise():
    """Each of their hosts has a `slice_index`, and fsdp may lie over hosts."""
    kind = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
    assert set(slices_of(acejax.make_mesh({"fsdp": 4}, devices(0, 0, 1, 1, **kind))).flat) == {0, 1}
    with pytest.raises(UserError, match="data is 1 on 2 slices; expected a multiple of 2"):
        acejax.make_mesh({"fsdp": 4}, devices(0, 0, 1, 1, **kind), slices=2)
    found = slices_of(acejax.make_mesh({"data": 2, "fsdp": 2}, devices(0, 1, 1, 0, **kind), slices=2))
    assert found.reshape(2, 2).tolist() == [[0, 0], [1, 1]]


def test_neighbours_are_a_slice_where_devices_do_not_say():
    same = devices(*[0] * 8, platform="cpu", device_kind="cpu")
    mesh = acejax.make_mesh({"data": 4, "fsdp": 2}, same, slices=2)
    assert [device.id for device in mesh.devices.flat] == [*range(8)]


@pytest.mark.parametrize("shape, places, slices, message", [
    ({"data": 1, "fsdp": -1}, (0, 0, 1, 1), None, "data is 1 on 2 slices; expected a multiple of 2"),
    ({"data": 3, "fsdp": 2}, (0, 0, 0, 1, 1, 1), None, "data is 3 on 2 slices"),
    ({"data": -1}, (0, 0, 1, 1), 1, "1 equal slices expected; found 4 devices of 2 slices"),
    ({"data": -1}, (0, 0, 0, 1), None, r"2 equal slices expected; found 4 devices of 2 slices \(3, 1\)"),
    ({"data": -1}, (0, 0, 0, 0), 3, "3 equal slices expected; found 4 devices"),
    ({"data": -1}, (0, 0, 0, 0), 0, "0 equal slices expected"),
])
def test_slices_that_can_not_be_are_named(shape, places, slices, message):
    with pytest.raises(UserError, match=message):
        acejax.make_mesh(shape, devices(*places), slices=slices)
    if slices is None and len(set(places)) == 2 and "data is" in message:
        with pytest.raises(UserError, match=message):
            abstract_mesh(shape, len(places), slices=2)


def test_a_mesh_without_devices_has_the_same_axes():
    mesh = abstract_mesh({"data": 2, "fsdp": -1}, 8, slices=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "seq": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert rules.batch_sharding(mesh).spec == P(("fsdp", "data"))


def test_an_axis_may_take_a_part_of_the_networks():
    """Of 4 x 4 chips there are no eight in a row: jax.make_mesh has no mesh of 2 x 8."""
    square = [Square(number, 0) for number in range(16)]
    assert acejax.make_mesh({"data": 2, "fsdp": 8}, square).shape["fsdp"] == 8
    with pytest.raises(NotImplementedError):
        jax.make_mesh((2, 8), ("data", "fsdp"), devices=square)


def test_devices_that_jax_makes_no_mesh_of_are_named():
    cores = [dataclasses.replace(one, core_on_chip=one.id % 2) for one in devices(0, 0, 0, 0, device_kind="TPU v4")]
    with pytest.raises(UserError, match="jax makes none of 4 devices 'TPU v4': "):
        acejax.make_mesh({"fsdp": 4}, cores)


def test_weights_go_onto_a_mesh_that_lacks_axes_and_no_others(tmp_path):
    model, path, one = cases.config(), tmp_path / "model.safetensors", np.array(jax.devices()[:1])
    acejax.save_model(path, model, keymaps.from_foreign(model, cases.state(model).__getitem__, "bfl"))
    _, params = acejax.load_mmdit(path, model, mesh=Mesh(one, ("fsdp",), axis_types=(AxisType.Auto,)))
    assert params["img_in"]["kernel"].sharding.spec == P("fsdp", None)
    _, whole = acejax.load_mmdit(path, model, mesh=acejax.make_mesh(devices=one))
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    for mesh, message in (
            (jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Explicit,), devices=one),
             "axes of {'fsdp': 1} are Explicit; expected Auto: acejax.make_mesh makes such a mesh"),
            (type("Mesh", (), {"shape": {"data": 1, "model": 8}}), "unknown axis model of {'data': 1, 'model': 8}")):
        with pytest.raises(UserError, match=message):
            acejax.load_mmdit(path, model, mesh=mesh)
        for use in (rules.batch_sharding, rules.constrain, rules.share, functools.partial(rules.shardings, params)):
            with pytest.raises(UserError, match=message):
                use(mesh)


@needs_libtpu
def test_real_slices_make_the_mesh_that_jax_makes_of_them():
    done = subprocess.run([sys.executable, "-m", "tests.parallel.slices"], cwd=ROOT, env=os.environ.copy(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
