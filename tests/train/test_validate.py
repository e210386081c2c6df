import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import flow
from acejax.data.subset import Subset, hold_out
from acejax.model.config import Execution, MMDiTConfig
from acejax.model.mmdit import init
from acejax.parallel import rules
from acejax.parallel.mesh import make_mesh
from acejax.train.config import ValidationConfig
from acejax.train.held import Held
from acejax.train.step import StepConfig, velocity_errors
from acejax.train.validate import HeldOut, Losses, Validation
from tests.counts import count
from tests.train.small import SIZES, Table, make_config

ROOT = pathlib.Path(__file__).parents[2]
SIGMAS = (0.2, 0.7)


def setting(mesh, in_channels: int = 448) -> StepConfig:
    model = MMDiTConfig(**make_config().model.to_dict() | {"in_channels": in_channels})
    return StepConfig(model, Execution(jnp.float32, constrain=rules.constrain(mesh)), 2, 4, 4.0, 0.0, 1.0, 0)


def parameters(model: MMDiTConfig, seed: int = 1):
    """As after some training: no layer is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32),
                        init(model, jax.random.key(seed)))


def losses(mesh_shape, sizes=SIZES, in_channels: int = 448, table=None) -> dict[str, float]:
    mesh = make_mesh(mesh_shape, jax.devices()[:int(np.prod([*mesh_shape.values()]))])
    held = Held(hold_out(Table(), 3, 0)[1] if table is None else table, mesh, dict(sizes), 7)
    step = setting(mesh, in_channels)
    params = parameters(step.config)
    return Losses(step, held, SIGMAS, mesh)(jax.device_put(params, rules.shardings(params, mesh)))


@functools.cache
def once() -> dict[str, float]:
    return losses({"data": 1})


def test_what_is_held_out_is_disjoint_and_stable():
    table = Table()
    training, held = hold_out(table, 3, 0)
    assert sorted([*training.indices, *held.indices]) == list(range(len(table)))
    assert np.bincount(held.task).tolist() == [3, 3, 3, 3] and held.tasks == table.tasks
    np.testing.assert_array_equal(held.indices, hold_out(table, 3, 0)[1].indices)
    assert set(held.indices) < set(hold_out(table, 4, 0)[1].indices)  # more of them are those and others
    assert set(held.indices) != set(hold_out(table, 3, 1)[1].indices)
    assert len(hold_out(table, 30, 0)[1]) == 16 and len(hold_out(Table(9), 30, 0)[1]) == 0  # at most a tenth
    assert held.fetch(1, np.random.default_rng()) is table.fetch(held.indices[1], np.random.default_rng())


def test_a_task_is_split_alike_whatever_stands_beside_it():
    class Two(Table):
        """The small table with a second dataset before it."""

        datasets = ("more", "small")

        def __init__(self):
            super().__init__(80)
            self.dataset = np.tile(np.repeat(np.arange(2, dtype=np.int32), 40), 4)

    alone, beside = hold_out(Table(), 3, 0)[1], hold_out(Two(), 3, 0)[1]
    own = beside.indices[beside.dataset == 1]
    np.testing.assert_array_equal(alone.indices, own - 40 * (1 + own // 80))


def test_a_digest_names_the_samples_and_their_order():
    table = Table()
    assert Subset(table, [1, 2]).digest == ""
    table.digest = "one"
    names = {Subset(table, some).digest for some in ([1, 2], [2, 1], [1, 2, 3])}
    table.digest = "two"
    assert len(names | {Subset(table, [1, 2]).digest, ""}) == 5


@pytest.mark.parametrize("in_channels", count((448,), (64, 384, 448)))
def test_losses_are_means_of_the_training_loss(in_channels):
    """Against the whole table as one batch."""
    found = once() if in_channels == 448 else losses({"data": 1}, in_channels=in_channels)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    step = setting(mesh, in_channels)
    held = Held(hold_out(Table(), 3, 0)[1], mesh, {12: 12}, 7)
    (whole,) = held.batches(range(12))
    batch, params = held.feed(whole), parameters(step.config)

    @jax.jit
    def run(sigma):
        return flow.parts(*velocity_errors(params, step, batch, batch["noise"], jnp.full((12,), sigma)),
                          {"task": (batch["task"], 4)})

    parts = [run(sigma) for sigma in SIGMAS]
    expected = {f"sigma/{sigma}": float(loss) for sigma, (loss, _) in zip(SIGMAS, parts, strict=True)}
    expected |= {"loss": np.mean([loss for loss, _ in parts]), "L_tar": np.mean([part["tar"] for _, part in parts])}
    expected |= {f"L_ref/{k + 1}": np.mean([part["ref"][k] for _, part in parts]) for k in range(2)}
    expected |= {f"task/{name}": np.mean([part["task"][k] for _, part in parts]) for k, name in enumerate("abrs")}
    assert found.keys() == {f"validation/{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(found[f"validation/{name}"], value, rtol=1e-5, err_msg=name)


def test_two_calls_give_the_same_bits_and_another_model_another_loss():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    step = setting(mesh)
    measure = Losses(step, Held(hold_out(Table(), 3, 0)[1], mesh, dict(SIZES), 7), SIGMAS, mesh)
    params = parameters(step.config)
    first = measure(params)
    assert first == measure(params) == once()
    assert abs(measure(parameters(step.config, 5))["validation/loss"] - first["validation/loss"]) > 0.01


def test_batches_and_padding_do_not_count():
    """Other batch sizes, buckets and orders: the same numbers."""
    small = losses({"data": 1}, ((4, 2), (8, 2), (20, 2)))  # the last batch of a bucket is filled up
    held = hold_out(Table(), 3, 0)[1]
    backwards = losses({"data": 1}, table=Subset(held.table, held.indices[::-1]))
    for other in (small, backwards):
        assert other.keys() == once().keys()
        np.testing.assert_allclose([other[name] for name in once()], [*once().values()], rtol=1e-5)


def test_a_batch_is_no_larger_than_what_training_computes_at_once():
    mesh, held_out = make_mesh({"data": 1}, jax.devices()[:1]), HeldOut(hold_out(Table(), 4, 0)[1])
    for accumulate, largest in (1, 8), (4, 2):
        step = dataclasses.replace(setting(mesh), accumulate=accumulate)
        found = Validation(step, ValidationConfig(), held_out, mesh, {4: 8, 8: 8, 12: 8}, 0)
        assert max(batch.size for batch in found.losses._batches) == largest


def test_a_table_that_lacks_a_part_does_not_report_it():
    table = hold_out(Table(), 3, 0)[1]
    found = losses({"data": 1}, table=Subset(table.table, table.indices[table.task == 1]))
    assert {"validation/task/b", "validation/L_tar"} < found.keys()
    assert not {"validation/task/a", "validation/L_ref/1", "validation/L_ref/2"} & found.keys()


def test_noise_is_a_samples_own():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    table = hold_out(Table(), 3, 0)[1]
    rows = [Held(table, mesh, dict(SIZES), 7).row(sample)["noise"] for sample in (0, 1)]
    alone = Held(Subset(table.table, table.indices[1:2]), mesh, {40: 1}, 7).row(0)["noise"]
    np.testing.assert_array_equal(rows[1], alone)
    assert (rows[0] != rows[1]).any()
    assert (Held(table, mesh, dict(SIZES), 8).row(0)["noise"] != rows[0]).any()


@pytest.mark.long
def test_eight_devices_give_the_numbers_of_one():
    script = """
import json
from tests.train.test_validate import losses
print(json.dumps([losses({"fsdp": 4, "tensor": 2}), losses({"data": 8})]))
"""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found.keys() == once().keys()
        np.testing.assert_allclose([found[name] for name in once()], [*once().values()], rtol=1e-5)
