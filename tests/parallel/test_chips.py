"""Slices by name, and chips by what jax calls them."""

import types

import pytest

from acejax.errors import UserError
from acejax.model.attention import resolve
from acejax.parallel.chips import CHIPS, GIB, chip_of, slice_sizes, topology


@pytest.mark.parametrize(("name", "chip", "devices", "chips"), [
    ("h100x1", "h100", 1, 1), ("h100x8", "h100", 8, 8), ("h100x5", "h100", 5, 5), ("h200", "h200", 1, 1),
    ("a100-80x16", "a100-80", 16, 16), ("gb200x72", "gb200", 72, 72), ("mi355x", "mi355x", 1, 1),
    ("mi300xx8", "mi300x", 8, 8), ("v5e-256", "v5e", 256, 256), ("v5litepod-256", "v5e", 256, 256),
    ("v5p-128", "v5p", 64, 64), ("v5px64", "v5p", 64, 64), ("v4-8", "v4", 4, 4), ("v6e-4", "v6e", 4, 4),
    ("v7x-64", "v7x", 64, 32), ("v7xx64", "v7x", 128, 64), ("tpu7x-8", "v7x", 8, 4)])
def test_a_slice_is_a_chip_and_a_number_of_devices(name, chip, devices, chips):
    found = topology(name)
    assert (found.name, found.chip, found.devices, found.slices) == (name, CHIPS[chip], devices, 1)
    assert found.chips == chips


@pytest.mark.parametrize(("name", "devices", "slices", "shape"), [
    ("v5e-256x2", 512, 2, "16x16"), ("v5p-128x3", 192, 3, "4x4x4"), ("v7x-8x4", 32, 4, "2x2x1"),
    ("v6e-8x1", 8, 1, "2x4")])
def test_several_slices_are_of_one_shape(name, devices, slices, shape):
    found = topology(name)
    assert (found.devices, found.slices, found.shape) == (devices, slices, shape)


def test_a_cpu_is_no_chip():
    found = topology("cpu:64")
    assert (found.chip, found.devices, found.slices, found.shape, found.target) == (None, 64, 1, None, None)


@pytest.mark.parametrize(("name", "target"), [  # all of them made by libtpu 0.0.50, with as many devices
    ("v5e-1", "v5e:1x1"), ("v5e-8", "v5e:2x4"), ("v5e-128", "v5e:8x16"), ("v6e-8", "v6e:2x4"), ("v6e-256", "v6e:16x16"),
    ("v5p-8", "v5p:2x2x1"), ("v5p-128", "v5p:4x4x4"), ("v5p-1024", "v5p:8x8x8"), ("v5p-768", "v5p:4x8x12"),
    ("v4-8", "v4:2x2x1"), ("v7x-2", "tpu7x:1x1x1"), ("v7x-64", "tpu7x:2x4x4"), ("v7x-128", "tpu7x:4x4x4"),
    ("v7x-256", "tpu7x:4x4x8")])
def test_a_slice_has_a_shape_and_a_name_for_libtpu(name, target):
    found = topology(name)
    assert found.target == target and found.shape == target.split(":")[1]


def test_a_gpu_has_no_shape():
    assert topology("h100x16").shape is topology("h100x16").target is None


@pytest.mark.parametrize("name", [
    "", "h100x0", "h100x", "v5e-", "cpu", "cpu:0", "a100", "tpu-8", "v5e-256x", "v5e-256x0", "v5ex4x2", "cpu:8x2"])
def test_what_is_no_slice_is_named(name):
    with pytest.raises(UserError, match=rf"topology {name!r} is unknown"):
        topology(name)


@pytest.mark.parametrize(("name", "nearest"), [
    ("v5e-255", "the nearest are v5e-128 (8x16 chips) and v5e-256 (16x16 chips)"),
    ("v5e-2", "the nearest are v5e-1 (1x1 chips) and v5e-4 (2x2 chips)"),
    ("v6e-512", "the nearest is v6e-256 (16x16 chips)"),
    ("v5e-24x2", "the nearest are v5e-16 (4x4 chips) and v5e-32 (4x8 chips)"),
    ("v5p-127", "named by TensorCores, two a chip, are v5p-64 (2x4x4 chips) and v5p-128 (4x4x4 chips)"),
    ("v4-2", "named by TensorCores, two a chip, is v4-8 (2x2x1 chips)"),
    ("v7x-66", "are v7x-64 (2x4x4 chips) and v7x-128 (4x4x4 chips)"),
])
def test_a_slice_that_does_not_exist_is_told_the_nearest(name, nearest):
    with pytest.raises(UserError) as error:
        topology(name)
    assert str(error.value).startswith(f"topology {name!r}: there is no such slice; ")
    assert str(error.value).endswith(nearest)


def test_gpus_come_in_no_slices():
    with pytest.raises(UserError, match="only TPUs come in slices; expected h100x16"):
        topology("h100-8x2")


def test_all_slices_exist():
    assert slice_sizes(CHIPS["v5e"]) == [1, 4, 8, 16, 32, 64, 128, 256]
    assert slice_sizes(CHIPS["v7x"])[:7] == [2, 8, 16, 32, 64, 128, 256]
    for chip in ("v4", "v5e", "v5p", "v6e", "v7x"):
        sizes = slice_sizes(CHIPS[chip])
        assert sizes == sorted(sizes) and sizes[-1] == CHIPS[chip].domain
        assert all(topology(f"{chip}-{size * CHIPS[chip].cores}").devices == size for size in sizes)


@pytest.mark.parametrize(("kind", "chip"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA B200", "b200"), ("NVIDIA GB200", "gb200"),
    ("NVIDIA B300 SXM6 AC", "b300"), ("NVIDIA GB300", None), ("AMD Instinct MI300X", "mi300x"),
    ("AMD Instinct MI300X VF", "mi300x"), ("AMD Instinct MI325X", "mi325x"), ("AMD Instinct MI355X", "mi355x"),
    ("AMD Instinct MI350X VF", None), ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"), ("cpu", None),
    ("NVIDIA H100 PCIe", None)])
def test_a_device_is_known_by_its_kind(kind, chip):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) == CHIPS.get(chip)


def test_a_kind_is_of_one_chip():
    for chip in CHIPS.values():
        assert chip.kind not in [other.kind for other in CHIPS.values() if other is not chip]


@pytest.mark.parametrize(("name", "limit", "clock", "flops_of_a_cycle"), [
    ("v5e", 15.75, 1.5e9, 2**17), ("v6e", 31.24, 1.75e9, 2**19), ("v5p", 95.73, 1.75e9, 2**18),
    ("v7x", 94.74, 2.2e9, 2**19)])
def test_a_tpu_has_its_compiler_s_limit_and_clock(name, limit, clock, flops_of_a_cycle):
    chip = CHIPS[name]
    assert (chip.limit, chip.clock, chip.hbm) == (limit * GIB, clock, limit * GIB)
    assert chip.flops / chip.clock == pytest.approx(flops_of_a_cycle, rel=3e-3)


def test_a_gpu_has_neither():
    assert all(chip.clock is chip.limit is None for chip in CHIPS.values() if chip.platform == "gpu")


def test_a_kernel_is_for_its_platform():
    """As `acejax.model.attention.resolve` takes it: cuDNN is NVIDIA's."""
    found = [resolve("auto", CHIPS[name].platform, 4608) for name in ("h100", "mi300x", "v7x")]
    assert found == ["cudnn", "xla_chunked", "flash"]
