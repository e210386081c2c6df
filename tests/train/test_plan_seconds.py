"""The plan's seconds by default against the cycles of the TPU's own compiler, for the steps that it has compiled."""

import dataclasses
import json
import pathlib

import pytest

from acejax import MMDiTConfig
from acejax.parallel.chips import CHIPS, topology
from acejax.train.config import LoraConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import plan
from acejax.train.plan_time import ASSUMED, COMPILED, GIVEN, GUESSED, efficiency_of

RUN = TrainConfig(seed=0, steps=10, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  mesh={"fsdp": -1})
LORA = dataclasses.replace(RUN, model=MMDiTConfig.flux_fill(), lora=LoraConfig(64, base="int8"))
RECORDED = {row["figure"]: row["ours"] for row in json.loads(
    (pathlib.Path(__file__).parents[2] / "benchmarks/results/tpu.json").read_text())["rows"]}
CUBE = {"data": 4, "fsdp": 16}


def planned(run, name, efficiency=None):
    there = topology(name)
    return plan(run, {4096: there.devices}, 512, there.chip, there.devices, efficiency, there.slices)


@pytest.mark.parametrize(("name", "mesh"), [("v6e-8", {"fsdp": 8}), ("v5p-128", CUBE), ("v5e-256", {"fsdp": 256})])
def test_a_step_takes_what_the_compiler_says(name, mesh):
    cycles = RECORDED[f"full {name}"]
    found = planned(dataclasses.replace(RUN, mesh=mesh), name)
    assert found.largest.seconds == pytest.approx(1e9 * cycles / topology(name).chip.clock, rel=0.03)
    assert f"s a step at {found.efficiency:.0%} of the peak (by the TPU compiler's cycles)" in found.line()


@pytest.mark.parametrize(("name", "figure"), [("v6e-1", "LoRA, int8 base v6e-1"), ("v6e-8", "LoRA, int8 base v6e-8")])
def test_another_step_than_the_one_it_was_read_off_takes_about_that(name, figure):
    found = planned(LORA, name)
    assert found.largest.seconds == pytest.approx(1e9 * RECORDED[figure] / CHIPS["v6e"].clock, rel=0.2)


def test_what_was_not_compiled_is_assumed_and_what_is_given_is_taken():
    assert efficiency_of(CHIPS["v6e"]) == (0.49, COMPILED) and efficiency_of(CHIPS["v6e"], 0.3) == (0.3, GIVEN)
    assert {name for name, chip in CHIPS.items() if efficiency_of(chip)[1] == COMPILED} == {"v5e", "v5p", "v6e"}
    assert efficiency_of(CHIPS["h100"]) == efficiency_of(None) == (ASSUMED, GUESSED)
    assert "at 50% of the peak (assumed)" in planned(RUN, "h100x8").table()
    assert "at 40% of the peak (as given)" in planned(RUN, "v6e-8", 0.4).table()
