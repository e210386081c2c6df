"""Rules and meshes, on eight virtual devices in a process of their own."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from acejax import UserError
from acejax.parallel.mesh import make_mesh

ROOT = pathlib.Path(__file__).parents[2]

SCRIPT = """
import functools, jax, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import acejax
from acejax.adapt.lora import init as init_lora
from acejax.adapt.quantize import quantize
from acejax.parallel.mesh import make_mesh
from acejax.parallel.rules import batch_parts, batch_sharding, constrain, path_of, shardings
mesh = make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "seq": 1}
params = jax.eval_shape(functools.partial(acejax.init, acejax.MMDiTConfig()), jax.random.key(0))
state = jax.eval_shape(optax.adamw(1e-3).init, params)
specs = {path_of(path): place.spec for path, place in jax.tree_util.tree_leaves_with_path(shardings(params, mesh))}
assert specs["double_blocks/img/qkv/kernel"] == P(None, "fsdp", None, "tensor", None)
assert specs["single_blocks/mlp_out/kernel"] == P(None, ("tensor", "fsdp"), None)
assert specs["single_blocks/modulation/kernel"] == P(None, "fsdp", None, "tensor")
assert specs["img_in/kernel"] == P("fsdp", "tensor")
assert specs["final_layer/linear/kernel"] == P("fsdp", "tensor")
total = sum(leaf.size for leaf in jax.tree.leaves(params))
split = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if "fsdp" in str(specs[path_of(path)]))
assert split > 0.999 * total, split / total
moments = {path_of(path): place.spec for path, place in jax.tree_util.tree_leaves_with_path(shardings(state, mesh))}
assert moments["0/mu/double_blocks/txt/proj/kernel"] == P(None, ("tensor", "fsdp"), None)
lora = jax.eval_shape(lambda: init_lora(acejax.MMDiTConfig(), jax.random.key(0), 16))
pairs = {path_of(path): place.spec for path, place in jax.tree_util.tree_leaves_with_path(shardings(lora, mesh))}
for module in {path.rpartition("/")[0] for path in pairs}:  # a lies as the kernel's inputs, b as its features
    layers, inputs, *features = specs[module + "/kernel"]
    assert pairs[module + "/a"] == P(layers, inputs, None), module
    assert pairs[module + "/b"] == P(layers, None, *features), module
    assert pairs[module + "/scale"] == P(None, None, None), module
assert pairs["single_blocks/qkv/b"] == P(None, None, None, "tensor", None)
left, quant = jax.eval_shape(quantize, params)
eight = {path_of(path): place.spec for path, place in jax.tree_util.tree_leaves_with_path(shardings(quant, mesh))}
assert len(eight) == 30
for path, spec in eight.items():
    assert spec == specs[path[:-1] + "kernel"] if path.endswith("/q") else not any(spec), path
one_head = acejax.MMDiTConfig.tiny(num_heads=1, axes_dim=(32, 48, 48))
tiny = jax.eval_shape(functools.partial(acejax.init, one_head), jax.random.key(0))
odd = {path_of(path): place.spec for path, place in jax.tree_util.tree_leaves_with_path(shardings(tiny, mesh))}
assert odd["single_blocks/qkv/kernel"] == P(None, "fsdp", None, None, None), "one head cannot be split"
fewer = jax.make_mesh((2, 4), ("tensor", "data"), axis_types=(AxisType.Auto,) * 2)
placed = shardings(params, fewer)
assert placed["double_blocks"]["img"]["qkv"]["kernel"].spec == P(None, None, None, "tensor", None)
assert placed["single_blocks"]["mlp_out"]["kernel"].spec == P(None, "tensor", None)
assert batch_sharding(fewer).spec == P("data") and batch_sharding(mesh).spec == P(("fsdp", "data"))
assert batch_parts(fewer) == 4
x = jax.jit(lambda x: constrain(fewer)(constrain(fewer)(x, "hidden"), "tokens"))(jax.numpy.ones((4, 2, 6)))
assert x.sharding.is_equivalent_to(NamedSharding(fewer, P("data", None, "tensor")), 3), x.sharding
"""


def test_rules_split_the_whole_model_and_its_optimizer_state():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_mesh_that_does_not_fit_is_named():
    for shape in ({"data": len(jax.devices()) + 1}, {"data": -1, "fsdp": 3}, {"data": 0}):
        with pytest.raises(UserError, match="does not make up the"):
            make_mesh(shape)
    with pytest.raises(UserError, match="several axes of -1; expected one at most"):
        make_mesh({"data": -1, "fsdp": -1})
    with pytest.raises(UserError, match="unknown axis model; the axes are data, fsdp, tensor, seq"):
        make_mesh({"model": 2})
