"""What is saved in the host's memory, in a plan: off the device, on the machine, seconds where the bus is known."""

import dataclasses

import pytest

from acejax import MMDiTConfig
from acejax.parallel.chips import CHIPS, topology
from acejax.train.config import ExecutionConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import plan, settled
from acejax.train.plan_remat import using
from acejax.train.plan_run import whole

RUN = TrainConfig(seed=0, steps=10, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  mesh={"fsdp": -1}, execution=ExecutionConfig(remat="auto"))
ARRAY = 4608 * 3072 * 2  # bytes of [1, tokens, hidden_size] in bfloat16
HIDDEN = {"attention": (19 + 38, 1), "mlp": (4 * (19 + 38), 4), "proj": (19, 1)}  # of all blocks, of the larger one


def planned(name, setting):
    there = topology(name)
    return plan(using(RUN, setting), {4096: there.devices}, 512, there.chip, there.devices, slices=there.slices)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_device_keeps_one_block_s_and_the_host_all(name):
    full, host = planned("v5p-128", "full").largest, planned("v5p-128", f"{name}:host").largest
    everywhere, of_one = HIDDEN[name]
    assert host.offloaded == pytest.approx(everywhere * ARRAY) and full.offloaded == 0
    assert host.memory.saved == full.memory.saved
    assert host.memory.working - full.memory.working == pytest.approx(of_one * ARRAY)
    assert host.hardware_flops == planned("v5p-128", name).largest.hardware_flops < full.hardware_flops


@pytest.mark.parametrize(("name", "bus"), [("h100x8", 64e9), ("a100-80x8", 32e9), ("v4-64", 16e9)])
def test_the_way_back_is_exposed(name, bus):
    here, host = planned(name, "attention").largest, planned(name, "attention:host").largest
    assert host.reading == pytest.approx(57 * ARRAY / bus)
    assert host.seconds - here.seconds == pytest.approx(host.reading)
    assert f"{host.reading:.3f} s for it to come back" in planned(name, "attention:host").table()


def test_an_unknown_bus_is_told():
    found = planned("v6e-8", "attention:host")
    assert found.largest.reading == 0
    assert "in the host's memory 1.614 for each device; how fast it comes back is not known" in found.table()
    assert "host's memory" not in planned("v6e-8", "attention").table()


def test_each_part_of_a_batch_comes_back():
    run = using(dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, accumulate=2)), "attention:host")
    found = plan(run, {4096: 16}, 512, CHIPS["h100"], 8).largest
    assert found.offloaded == pytest.approx(57 * ARRAY) and found.reading == pytest.approx(2 * 57 * ARRAY / 64e9)


def test_a_machine_holds_what_its_devices_save_there():
    here, there = (whole(RUN, planned("h100x8", setting), 8).host_memory for setting in ("attention", "attention:host"))
    assert there - here == pytest.approx(8 * 57 * ARRAY)


@pytest.mark.parametrize("name", ["v4-64", "v5e-256", "v6e-8", "v5p-128", "h100x8", "a100-80x8", "mi300x"])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_auto_leaves_the_host_alone(name, samples):
    there = topology(name)
    chosen = settled(RUN, {4096: samples * there.devices}, 512, there.chip, there.devices).execution.remat
    assert "host" not in chosen and "auto" not in chosen
