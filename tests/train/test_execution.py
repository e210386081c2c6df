"""What a run's config says of how it is computed reaches the step, the plan, and whoever starts it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax import UserError
from acejax.cli.config import folder
from acejax.parallel.mesh import abstract_mesh, make_mesh
from acejax.train import plan_time
from acejax.train.config import ExecutionConfig, TrainConfig
from acejax.train.program import Program
from tests.train.small import make_config

FIELDS = {"dtype": "bfloat16", "attention": "xla", "remat": "attention", "reduce_dtype": "float32",
          "int8_products": True}


def config_of(base: str = "int8", **execution):
    config = make_config()
    config.lora = {"rank": 2, "alpha": None, "base": base}
    config.optimizer.ema = 0.0
    config.execution = execution
    return config


def test_each_field_is_in_the_configs_that_users_start_from():
    namespace = {}
    exec((folder() / "ace_plus.py").read_text(), namespace)
    known = {field.name for field in dataclasses.fields(ExecutionConfig)} - {"compiler_options"}  # a dict of names
    assert set(namespace["get_config"]().execution) == known


def test_it_reaches_the_step():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(ExecutionConfig)} - {"compiler_options"}
    run = TrainConfig.of(config_of(**FIELDS))
    execution = Program.of(run, make_mesh({"data": 1}, jax.devices()[:1]), references=2, tasks=4).setting.execution
    assert {name: getattr(execution, name) for name in FIELDS} == FIELDS | {
        "dtype": jnp.bfloat16, "reduce_dtype": np.float32}


@pytest.mark.parametrize("base, execution, told", [
    ("bfloat16", {"int8_products": True}, "int8_products is True without a base in int8"),
    ("float8", {"int8_products": True}, "expected config.lora.base=int8 with it"),
    ("int8", {"reduce_dtype": "float16"}, "reduce_dtype is 'float16'; expected float32, or None for dtype"),
])
def test_what_can_not_be(base, execution, told):
    with pytest.raises(UserError, match=told):
        TrainConfig.of(config_of(base, **execution))


def test_gradients_in_float32_are_twice_as_long_on_their_way():
    run, wide = (TrainConfig.of(config_of(dtype="bfloat16", reduce_dtype=dtype)) for dtype in (None, "float32"))
    run, wide = (dataclasses.replace(each, lora=None) for each in (run, wide))
    mesh = abstract_mesh({"data": 2, "fsdp": 4}, 8)
    sent, wider = ({sending.axis: sending.nbytes for sending in plan_time.sendings(each, mesh, 8, 64)}
                   for each in (run, wide))
    assert wider["data"] == 2 * sent["data"] and wider["fsdp"] == pytest.approx(4 / 3 * sent["fsdp"])
