"""remat="auto": the least recomputed that fits, on both sides of a line."""

import dataclasses

import pytest

from acejax import MMDiTConfig
from acejax.errors import UserError
from acejax.model import remat
from acejax.parallel.chips import topology
from acejax.train.config import ExecutionConfig, LoraConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import ONE_CARD, plan, settled
from acejax.train.plan_estimate import estimate
from acejax.train.plan_remat import ROOM, using

RUN = TrainConfig(seed=0, steps=10, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  mesh={"fsdp": -1}, execution=ExecutionConfig(remat="auto"))
BUCKETS, TEXT, DEVICES = {4096: 64, 1024: 256}, 512, 64
# Nothing that takes less memory than one of these recomputes less.
FRONT = ["full", "out", "attention,out", "attention,mlp,proj,out", "attention,qkv,mlp,proj,out"]


def holding(most: float):
    """A chip that takes so many bytes."""
    return dataclasses.replace(topology("v5p-128").chip, limit=most / ROOM)


def needed(setting: str) -> float:
    return plan(using(RUN, setting), BUCKETS, TEXT, holding(1e15), DEVICES).largest.memory.total


@pytest.mark.parametrize("setting", FRONT)
def test_a_setting_is_taken_where_it_just_fits_and_less_is_saved_where_it_does_not(setting):
    line = needed(setting)
    above = settled(RUN, BUCKETS, TEXT, holding(line * 1.0001), DEVICES).execution.remat
    assert above == setting
    below = settled(RUN, BUCKETS, TEXT, holding(line * 0.9999), DEVICES).execution.remat
    if setting == "full":
        assert below == "full"  # nothing takes less
    else:
        assert below != setting and needed(below) < line


def executed(found) -> float:
    """FLOPs of a step of each bucket."""
    return sum(step.hardware_flops for step in found.steps)


def test_nothing_that_fits_recomputes_less():
    others = [estimate(using(RUN, setting), BUCKETS, TEXT, holding(1e15), DEVICES, 0.5) for setting in remat.settings()]
    for most in {1.01 * other.largest.memory.total for other in others}:
        chosen = plan(RUN, BUCKETS, TEXT, holding(most), DEVICES)
        assert chosen.largest.memory.total <= most
        assert executed(chosen) == min(executed(other) for other in others if other.largest.memory.total <= most)


def test_less_memory_recomputes_more():
    found = [plan(RUN, BUCKETS, TEXT, holding(1.01 * needed(setting)), DEVICES) for setting in FRONT]
    shares = [each.largest.recomputed for each in found]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(FRONT)
    assert "auto" not in {each.remat for each in found} and all(f"remat {each.remat}" in each.line() for each in found)


def test_what_is_not_known_and_a_fused_step_take_the_least_memory():
    assert settled(RUN, BUCKETS, TEXT, None, DEVICES).execution.remat == "full"
    fused = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, **ONE_CARD))
    assert settled(fused, {4096: 1}, TEXT, topology("b200x1").chip, 1).execution.remat == "full"


def test_a_run_that_names_its_setting_keeps_it():
    for setting in ("full", "attention", "none", "mlp,out"):
        run = using(RUN, setting)
        assert settled(run, BUCKETS, TEXT, holding(1e15), DEVICES) is run


def test_a_lora_on_one_card_recomputes_little():
    run = dataclasses.replace(RUN, model=MMDiTConfig.flux_fill(), lora=LoraConfig(64))
    chosen = plan(run, {4096: 1}, TEXT, topology("h100x1").chip, 1)
    assert chosen.fits and chosen.remat != "full"
    assert chosen.largest.recomputed < plan(using(run, "attention"), {4096: 1}, TEXT, topology("h100x1").chip, 1
                                            ).largest.recomputed


def test_a_config_takes_names_and_auto_and_nothing_else():
    config = {"seed": 0, "steps": 1, "model": {}, "optimizer": {"learning_rate": 1e-5}}
    for setting in ("auto", "attention,out"):
        assert TrainConfig.of(config | {"execution": {"remat": setting}}).execution.remat == setting
    fused = config | {"optimizer": {"learning_rate": 1e-5, **ONE_CARD}}
    assert TrainConfig.of(fused | {"execution": {"remat": "auto"}}).execution.remat == "auto"
    with pytest.raises(UserError, match=r"remat is 'auto,out'; known: none, full, or with commas some of attention"):
        TrainConfig.of(config | {"execution": {"remat": "auto,out"}})
    with pytest.raises(UserError, match=r"config.execution.remat is 'out' and config.optimizer.fused True"):
        TrainConfig.of(fused | {"execution": {"remat": "out"}})
