"""What the backward pass finds saved: what the table says of it, and gradients that do not depend on it."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import acejax
from acejax.model import flops, remat
from acejax.model.mmdit import example
from tests.model.small import jit, random_params

CONFIG = acejax.MMDiTConfig.tiny(depth=2, depth_single_blocks=3, hidden_size=64, num_heads=2, mlp_ratio=3)
BATCH, IMAGE, TEXT = 2, 6, 3
NAMES = tuple(remat.TABLE)
SETTINGS = remat.settings()


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    random = np.random.default_rng(2)
    shapes = example(CONFIG, BATCH, IMAGE, TEXT)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype) if x.dtype == jnp.float32
                        else jnp.full(x.shape, IMAGE, x.dtype) if x.ndim == 1 else jnp.zeros(x.shape, x.dtype), shapes)


def loss(setting, params, tokens):
    return jnp.square(acejax.apply(CONFIG, params, tokens, execution=acejax.Execution(remat=setting))).mean()


@functools.cache
def saved(setting):
    """Activations' numbers that the forward pass gives to the backward pass: of blocks, in stacks [layers, B, ...]."""
    shapes = jax.eval_shape(acejax.init, CONFIG, jax.random.key(0)), example(CONFIG, BATCH, IMAGE, TEXT)
    found = jax.eval_shape(lambda *args: jax.vjp(functools.partial(loss, setting), *args)[1], *shapes)
    return sum(leaf.size for leaf in jax.tree.leaves(found) if leaf.ndim >= 4 and leaf.shape[1] == BATCH)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_saved_is_what_the_table_says(setting):
    inputs = BATCH * (IMAGE + TEXT) * CONFIG.hidden_size * (CONFIG.depth + CONFIG.depth_single_blocks)
    pairs = remat.values(CONFIG, setting).values()
    counted = sum(CONFIG.depth * double + CONFIG.depth_single_blocks * single for double, single in pairs)
    assert saved(setting) - inputs == BATCH * (IMAGE + TEXT) * counted


def test_none_saves_more_than_all_names():
    assert saved(remat.NONE) > max(map(saved, SETTINGS))


@pytest.fixture(scope="module")
def gradients(params, tokens):
    return jit(jax.grad(functools.partial(loss, remat.NONE)))(params, tokens)


OFFLOADED = [",".join(name + remat.HOST for name in NAMES), "attention,mlp:host"]


@pytest.mark.parametrize("setting", [remat.FULL, *NAMES, "attention,mlp,out", ",".join(NAMES), *OFFLOADED])
def test_no_set_changes_a_gradient(params, tokens, gradients, setting):
    found = jit(jax.grad(functools.partial(loss, setting)))(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max())), found, gradients)


def test_what_all_names_spare_are_the_blocks_products():
    once = flops.forward(CONFIG, TEXT, IMAGE)
    assert remat.flops(CONFIG, remat.FULL, TEXT + IMAGE) == 0
    assert remat.flops(CONFIG, remat.ATTENTION, TEXT + IMAGE) == once.attention
    assert remat.flops(CONFIG, ",".join(NAMES), TEXT + IMAGE) == once.attention + once.linear


@pytest.mark.parametrize("setting", OFFLOADED)
def test_what_is_named_so_lies_in_the_host_s_memory(setting):
    """As the program says: each stack of layers' values is a loop's result in that memory."""
    shapes = jax.eval_shape(acejax.init, CONFIG, jax.random.key(0)), example(CONFIG, BATCH, IMAGE, TEXT)
    traced = jax.make_jaxpr(jax.grad(functools.partial(loss, setting)))(*shapes).jaxpr
    of = [equation.outvars for equation in traced.eqns if equation.primitive.name == "scan"]
    there = sum(var.aval.size for each in of for var in each if "Host" in str(getattr(var.aval, "memory_space", "")))
    pairs = remat.values(CONFIG, setting, host=True).values()
    counted = sum(CONFIG.depth * double + CONFIG.depth_single_blocks * single for double, single in pairs)
    assert there == BATCH * (IMAGE + TEXT) * counted > 0


def test_names_have_one_order_and_each_set_is_there_once():
    assert remat.names("mlp, attention") == ("attention", "mlp")
    assert remat.setting(("out", "attention")) == "attention,out"
    assert len(set(SETTINGS)) == len(SETTINGS) == 2 ** len(NAMES)
    assert all(remat.setting(remat.names(each)) == each for each in SETTINGS)
    assert remat.places("mlp:host , attention") == {"attention": False, "mlp": True}
    assert remat.names("mlp:host,attention") == ("attention", "mlp") and remat.on_host("mlp:host,attention") == ("mlp",)
    assert not remat.on_host(remat.NONE)


def test_what_lies_in_the_host_s_memory_is_not_on_the_device():
    here, there = (remat.values(CONFIG, "attention,mlp:host", host) for host in (False, True))
    assert here == remat.values(CONFIG, "attention") and there == remat.values(CONFIG, "mlp")
    assert remat.flops(CONFIG, "attention,mlp:host", 9) == remat.flops(CONFIG, "attention,mlp", 9)


@pytest.mark.parametrize("setting", ["some", "full,attention", "none,mlp", "", "attention,", "full:host", ":host",
                                     "mlp:disk", "mlp,mlp:host"])
def test_what_is_no_set_is_refused(setting):
    with pytest.raises(ValueError, match=f"Execution.remat is '{setting}'; known: none, full, or with commas some of "
                                         "attention, qkv, mlp, proj, out"):
        acejax.Execution(remat=setting)


def products(jaxpr):
    """FLOPs of all matrix products: of a loop's body as often as it runs, of what is by platform once."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((inner, _), _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in inner)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inside = [products(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
        total += max(inside, default=0) if equation.primitive.name == "cond" else times * sum(inside)
    return total


def calls(jaxpr, name):
    """How often an operation of this name is written down."""
    return sum((name in str(equation.params.get("name", equation.primitive.name)))
               + sum(calls(inner, name) for inner in jax.extend.core.jaxprs_in_params(equation.params))
               for equation in jaxpr.eqns)


@pytest.mark.parametrize(("setting", "times"), [("full", 4), ("out", 4), ("attention", 2), ("attention,mlp", 2)])
def test_cudnn_runs_once_a_layer_where_attention_is_saved(setting, times, monkeypatch):
    """In two stacks; the kernel is traced and not run, on no GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 92_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda *_: True)
    execution = acejax.Execution(jnp.bfloat16, "cudnn", setting)
    shapes = jax.eval_shape(acejax.init, CONFIG, jax.random.key(0)), example(CONFIG, BATCH, IMAGE, TEXT + 1)
    traced = jax.make_jaxpr(jax.grad(
        lambda params, tokens: acejax.apply(CONFIG, params, tokens, execution=execution).sum().astype(jnp.float32)
    ))(*shapes)
    found = {name: calls(traced.jaxpr, f"dot_product_attention_{name}_wrapper") for name in ("fwd", "bwd")}
    assert found == {"fwd": times, "bwd": 2}


@functools.cache
def executed(setting):
    """FLOPs of forward and backward pass."""
    shapes = jax.eval_shape(acejax.init, CONFIG, jax.random.key(0)), example(CONFIG, BATCH, IMAGE, TEXT)
    return products(jax.make_jaxpr(jax.grad(functools.partial(loss, setting)))(*shapes).jaxpr)


@pytest.mark.parametrize("setting", [each for each in SETTINGS if remat.ATTENTION not in each])
def test_what_is_spared_is_what_the_table_says(setting):
    """Attention is a matter of its implementation: plain XLA makes the weights of a saved result anew."""
    spared = BATCH * remat.flops(CONFIG, setting, TEXT + IMAGE)
    assert executed(remat.FULL) - executed(setting) == spared
