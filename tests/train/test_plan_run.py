"""A run as a whole, against numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest

from acejax import MMDiTConfig
from acejax.parallel.chips import topology
from acejax.train.config import CheckpointConfig, ExecutionConfig, LoraConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import plan
from acejax.train.plan_data import Samples
from acejax.train.plan_run import whole

PARAMETERS = 11_902_587_968
RUN = TrainConfig(seed=0, steps=1000, model=MMDiTConfig(), optimizer=OptimizerConfig(learning_rate=1e-5),
                  mesh={"fsdp": -1}, execution=ExecutionConfig(attention="flash"))
BUCKETS = {4096: 16, 8192: 8}


def of(run: TrainConfig = RUN, name: str = "v6e-8", buckets=BUCKETS, **more):
    there = topology(name)
    found = plan(run, buckets, 512, there.chip, there.devices, slices=there.slices)
    return found, whole(run, found, there.chips, **more)


def test_without_data_all_steps_are_of_the_slowest_bucket():
    found, run = of()
    seconds = {step.image: step.seconds for step in found.steps}
    assert run.shares == {8192: 1.0} and run.seconds == seconds[8192] > seconds[4096]
    assert run.hours == pytest.approx(1000 * run.seconds / 3600)
    assert run.steps_a_day == pytest.approx(86400 / run.seconds)
    assert run.samples == 8000 and run.tokens == 8000 * 8704
    assert run.samples_a_day == pytest.approx(8 * run.steps_a_day)
    assert run.tokens_a_day == pytest.approx(8704 * run.samples_a_day)
    assert (run.data, run.epochs, run.cache, run.cache_found) == (None, None, None, False)


def test_steps_are_shared_as_the_data_fills_batches():
    data = Samples(400, np.repeat([4000, 4096, 5000], [200, 120, 80]), "the manifest")
    found, run = of(data=data)
    assert run.shares == pytest.approx({4096: 2 / 3, 8192: 1 / 3})  # 320 / 16 = 20 and 80 / 8 = 10 batches
    seconds = {step.image: step.seconds for step in found.steps}
    assert run.seconds == pytest.approx(2 / 3 * seconds[4096] + seconds[8192] / 3)
    assert run.samples == pytest.approx(1000 * (2 / 3 * 16 + 8 / 3))
    assert run.epochs == pytest.approx(run.samples / 400)
    assert run.data_tokens == 200 * 4000 + 120 * 4096 + 80 * 5000
    assert "400 samples, 1.69 M image tokens (the manifest); 33.3 epochs" in run.table()


def test_data_that_is_longer_than_the_plan_s_buckets_shares_nothing():
    assert of(data=Samples(4, np.full(4, 9000), "x"))[1].shares == {8192: 1.0}


def test_price_is_of_chips():
    run = of(name="v7x-64", buckets={4096: 64}, price=2.0)[1]
    assert run.chip_hours == pytest.approx(32 * run.hours) and run.price == pytest.approx(2 * run.chip_hours)
    assert "--price" not in run.table() and "  price " in run.table()
    free = of()[1]
    assert free.price is None and "; --price=P of one tells what they cost" in free.table()


def test_a_checkpoint_has_what_is_trained_and_the_optimizer_s_state():
    run = of()[1]
    assert run.checkpoint == pytest.approx(12 * PARAMETERS, rel=1e-6)
    assert (run.kept, run.exported) == (1, 0)  # of a thousand steps one is made
    assert run.checkpoints == 2 * run.checkpoint == run.disk
    averaged = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, ema=0.99))
    assert of(averaged)[1].checkpoint == pytest.approx(16 * PARAMETERS, rel=1e-6)


def test_all_that_is_kept_counts():
    kept = CheckpointConfig(every=100, keep=3, best=1, export_every=300, export_layout="bfl,diffusers",
                            export_dtype="bfloat16")
    run = of(dataclasses.replace(RUN, checkpoint=kept))[1]
    assert run.kept == 3  # there is no validation that would tell the best
    judged = dataclasses.replace(RUN, checkpoint=kept,
                                 validation=dataclasses.replace(RUN.validation, every=100))
    run = of(judged, data=Samples(100, np.full(100, 4096), "the feature cache", cached=7_000_000_000))[1]
    assert run.kept == 4 and run.checkpoints == 5 * run.checkpoint
    assert run.exported == 4  # 300, 600, 900 and the last
    assert run.export == pytest.approx(2 * 2 * PARAMETERS, rel=1e-6) and run.exports == 4 * run.export
    assert run.cache == 7e9 and run.cache_found
    assert run.disk == pytest.approx(run.checkpoints + run.exports + 7e9)
    assert "7 GB are in the cache" in run.table()


def test_features_are_estimated_before_they_are_made():
    run = of(data=Samples(100, np.full(100, 4096), "the manifest"), variants=2)[1]
    by_hand = 2 * 4096 * (3 * 64 * 2 + 256 / 8) + 512 * 4096 * 2 + 768 * 2
    assert run.cache == pytest.approx(100 * by_hand) and not run.cache_found
    assert "at most, by estimate" in run.table()


def test_a_lora_s_checkpoint_is_small():
    run = dataclasses.replace(RUN, model=MMDiTConfig.flux_fill(), lora=LoraConfig(64))
    assert of(run)[1].checkpoint == pytest.approx(12 * 306_315_264, rel=1e-3)


def test_a_machine_holds_its_part_of_the_checkpoint():
    found, run = of(name="v5e-64", buckets={4096: 64})
    batch = found.largest.memory.batch * 4
    assert run.host_memory == pytest.approx(8e9 + run.checkpoint * 4 / 64 + 5 * batch)
    assert run.host_has == 190e9 and "usual are 190 GB" in run.table()
    alone = of(name="h100x1", run=dataclasses.replace(RUN, lora=LoraConfig(64)), buckets={4096: 1})[1]
    assert alone.host_has == 2000e9 / 8  # of eight
    exported = dataclasses.replace(RUN, checkpoint=CheckpointConfig(export_every=100))
    more = of(exported, name="v5e-64", buckets={4096: 64})[1]
    assert more.host_memory - run.host_memory == pytest.approx(4 * PARAMETERS, rel=1e-6)


def test_a_cpu_has_no_time():
    run = of(name="cpu:8", run=dataclasses.replace(RUN, execution=ExecutionConfig(attention="xla_chunked")))[1]
    assert run.hours is run.steps_a_day is run.chip_hours is run.price is run.host_memory is None
    assert "hours" not in run.table() and "checkpoint  143 GB" in run.table()
