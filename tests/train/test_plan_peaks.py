"""The plan's memory against the peaks of the TPU's own compiler, for topologies that are too long to compile here."""

import dataclasses

import pytest

from acejax import MMDiTConfig
from acejax.parallel.chips import topology
from acejax.train.config import ExecutionConfig, LoraConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import plan

RUN = TrainConfig(seed=0, steps=10, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  mesh={"fsdp": -1})
# `peak_memory_in_bytes` and `argument_size_in_bytes` in GB of the 12B step, 512 + 4,096 tokens, AdamW in float32, by
# libtpu 0.0.50.1 with jax 0.12.0.1, found once (`acejax plan --config=configs/ace_plus.py:NAME --topology=NAME
# --tokens=4096 --text=512 --compile`).
PEAKS = [  # topology, mesh, samples a device, remat, peak, arguments
    ("v6e-8", {"fsdp": 8}, 1, "full", 28.170, 17.898),
    ("v5p-128", {"fsdp": 64}, 1, "full", 5.456, 2.280),
    ("v5p-128", {"data": 4, "fsdp": 16}, 1, "full", 14.478, 8.974),
    ("v5p-128", {"data": 4, "fsdp": 16}, 2, "attention,out", 22.801, 8.981),
    ("v5e-256", {"fsdp": 256}, 1, "full", 3.254, 0.679),
    ("v6e-256", {"fsdp": 256}, 1, "full", 3.312, 0.679),
    ("v7x-64", {"data": 2, "fsdp": 32}, 1, "full", 8.488, 4.511),
    ("v5e-256x2", {"data": 2, "fsdp": 256}, 1, "full", 4.274, 0.679),
]


def planned(name, mesh, samples, remat):
    there = topology(name)
    run = dataclasses.replace(RUN, mesh=mesh, execution=ExecutionConfig(remat=remat))
    found = plan(run, {4096: samples * there.devices}, 512, there.chip, there.devices, slices=there.slices)
    return found, found.largest.memory


@pytest.mark.parametrize(("name", "mesh", "samples", "remat", "peak", "arguments"), PEAKS)
def test_memory_is_the_compiler_s_peak(name, mesh, samples, remat, peak, arguments):
    found, held = planned(name, mesh, samples, remat)
    assert held.total == pytest.approx(1e9 * peak, rel=0.05)
    assert held.arguments == pytest.approx(1e9 * arguments, rel=0.03)
    assert found.fits == (1e9 * peak <= topology(name).chip.limit)


def test_what_the_compiler_refuses_does_not_fit():
    """A LoRA of rank 64 on Fill in bfloat16, one v6e: "memory required (32.73G) exceeds available HBM (31.24G)"."""
    run = dataclasses.replace(RUN, model=MMDiTConfig.flux_fill(), lora=LoraConfig(64))
    found = plan(run, {4096: 1}, 512, topology("v6e-1").chip, 1)
    assert not found.fits
    assert found.largest.memory.total == pytest.approx(32.73 * 2**30, rel=0.03)
