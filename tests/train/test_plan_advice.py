"""What is said of memory that is left over; what does not fit is in test_plan.py."""

import dataclasses

import pytest

from acejax import MMDiTConfig
from acejax.parallel.chips import topology
from acejax.train.config import ExecutionConfig, LoraConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import plan, remedy
from acejax.train.plan_advice import ONE_CARD, spare

RUN = TrainConfig(seed=0, steps=10, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  mesh={"fsdp": -1}, execution=ExecutionConfig(attention="cudnn"))


def of(run: TrainConfig, name: str, samples: int):
    """The plan and what its memory could be used for, with so many samples a device."""
    there = topology(name)
    buckets = {4096: samples * there.devices}
    found = plan(run, buckets, 512, there.chip, there.devices)
    return found, spare(run, found, buckets)


def test_less_is_recomputed_where_it_fits():
    run = dataclasses.replace(RUN, model=MMDiTConfig.flux_fill(), lora=LoraConfig(64))
    found, uses = of(run, "h100x1", 1)
    assert found.fits
    first = uses[0]
    assert first.change == "config.execution.remat=attention,qkv,mlp,proj,out"  # all that has a name
    assert first.before == found.largest.recomputed == pytest.approx(0.495, abs=0.005)
    assert first.recomputed == pytest.approx(0.04, abs=0.02)
    assert first.faster == pytest.approx(1 - (1 + first.recomputed) / (1 + first.before), rel=1e-6)
    assert found.largest.memory.total < first.total <= found.capacity
    assert str(first).startswith(f"{first.change}: ") and "recomputed FLOPs 50% -> " in str(first)


def test_a_smaller_batch_makes_room_for_less_recomputation():
    here, smaller, *_ = of(RUN, "b200x8", 16)[1]
    everything = "config.execution.remat=attention,qkv,mlp,proj,out"
    assert smaller.change in (f"{everything} with a batch 1/4 as large", f"{everything} with a batch 1/2 as large")
    assert here.change.startswith("config.execution.remat=") and len(here.change) < len(everything)
    assert smaller.recomputed < 0.05 < here.recomputed and smaller.faster > here.faster > 0.1


def test_the_largest_batch_that_fits_is_named():
    found, uses = of(RUN, "h100x8", 1)
    larger = next(use for use in uses if use.change.startswith("a batch "))
    times = int(larger.change.split()[2])
    there = topology("h100x8")
    assert plan(RUN, {4096: 8 * times}, 512, there.chip, 8).fits
    assert not plan(RUN, {4096: 8 * (times + 1)}, 512, there.chip, 8).fits or times == 16
    assert larger.recomputed == larger.before and "recomputed" not in str(larger)


@pytest.mark.parametrize(("run", "name", "samples"), [
    (RUN, "cpu:8", 1), (dataclasses.replace(RUN, mesh={"data": -1}), "h100x8", 1)])
def test_where_nothing_is_left_over_nothing_is_said(run, name, samples):
    assert of(run, name, samples)[1] == ()


def test_a_batch_that_saves_no_time_is_not_praised():
    run = dataclasses.replace(RUN, lora=LoraConfig(64))
    larger = of(run, "h100x1", 1)[1][-1]  # alone it sends nothing that could hide behind more products
    assert larger.faster == pytest.approx(0, abs=1e-12) and str(larger).endswith("; no less time a sample")


def test_a_fused_step_recomputes_its_blocks():
    run = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, **ONE_CARD))
    found, uses = of(run, "h100x1", 1)
    assert found.fits and uses and not any("remat" in use.change for use in uses)


def test_what_failed_is_told_a_remedy_on_machines_that_nobody_knows():
    run = dataclasses.replace(RUN, execution=ExecutionConfig(attention="xla_chunked", remat="none"))
    found = plan(run, {4096: 8}, 512, None, 8)
    assert remedy(run, found, {4096: 8}) == "config.execution.remat=attention,qkv,mlp,proj,out makes it fit"
