"""Slices by name, and chips by what jax calls them."""

import types

import pytest

from acejax.errors import UserError
from acejax.parallel.chips import CHIPS, chip_of, topology


@pytest.mark.parametrize(("name", "chip", "devices"), [
    ("h100x1", "h100", 1), ("h100x8", "h100", 8), ("h200", "h200", 1), ("a100-80x16", "a100-80", 16),
    ("v5e-256", "v5e", 256), ("v5p-128", "v5p", 64), ("v5px64", "v5p", 64), ("v4-8", "v4", 4), ("v6e-4", "v6e", 4)])
def test_a_slice_is_a_chip_and_a_number_of_devices(name, chip, devices):
    assert topology(name) == (CHIPS[chip], devices)


def test_a_cpu_is_no_chip():
    assert topology("cpu:64") == (None, 64)


@pytest.mark.parametrize("name", [
    "", "h100x0", "h100x", "v5e-", "cpu", "cpu:0", "a100", "v5p-128x2", "tpu-8", "v5p-127"])
def test_what_is_no_slice_is_named(name):
    with pytest.raises(UserError, match=repr(name)):
        topology(name)


@pytest.mark.parametrize(("kind", "chip"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ("NVIDIA L40S", "l40s"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"), ("cpu", None), ("NVIDIA H100 PCIe", None)])
def test_a_device_is_known_by_its_kind(kind, chip):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) == CHIPS.get(chip)
