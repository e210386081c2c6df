"""Kernels in eight bits: small errors that are measured, and LoRA trained on top (QLoRA)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from acejax.adapt import lora as adapt
from acejax.adapt import quantize as quantization
from acejax.adapt.targets import ACE_PLUS, select
from acejax.model.dense import Dense
from tests import loras
from tests.goldens import cases
from tests.loras import CONFIG

TOKENS = cases.inputs(CONFIG)


@pytest.mark.parametrize("kind, limit", [("int8", 0.02), ("float8", 0.05)])
def test_report(monkeypatch, kind, limit):
    """Each layer within the limit; the velocity's error is of the same order, and there is one."""
    monkeypatch.setattr(quantization, "_apply", loras.velocity)  # compiled faster
    report = quantization.report(CONFIG, loras.params(), kind, tokens=TOKENS)
    assert set(report["layers"]) == set(select(loras.params(), ACE_PLUS))
    assert {len(errors) for errors in report["layers"].values()} == {CONFIG.depth, CONFIG.depth_single_blocks}
    assert all(0.001 < error < limit for errors in report["layers"].values() for error in errors)
    assert 0.001 < report["velocity"] < 2 * limit


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_kernels_move_and_come_back(kind):
    params, quant = quantization.quantize(loras.params(), kind, ("single_blocks/qkv", "final_layer/modulation"))
    whole, left, eight = (flatten_dict(tree, sep="/") for tree in (loras.params(), params, quant))
    inputs = {"single_blocks/qkv/kernel": 1, "final_layer/modulation/kernel": 0}  # the axis that shares a scale
    assert whole.keys() - left.keys() == inputs.keys()
    assert eight["single_blocks/qkv/q"].dtype == quantization.KINDS[kind][0]
    assert eight["single_blocks/qkv/scale"].shape == (CONFIG.depth_single_blocks, 3, CONFIG.num_heads, CONFIG.head_dim)
    assert eight["final_layer/modulation/scale"].shape == (2, CONFIG.hidden_size)
    back = flatten_dict(quantization.dequantize(params, quant), sep="/")
    assert back.keys() == whole.keys()
    step = {"int8": 0.5 / 127, "float8": 2 ** -4}[kind]  # half a step of the greatest weight; E4M3 keeps three bits
    for path, leaf in back.items():
        limit = 1.001 * step * np.abs(whole[path]).max(inputs[path], keepdims=True) if path in inputs else 0
        assert np.all(np.abs(leaf - whole[path]) <= limit), path


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_dense_multiplies_what_dequantize_shows(kind):
    """Outliers, a channel of zeros and bfloat16 included: nothing becomes nan."""
    kernel = np.random.default_rng(0).standard_normal((16, 3, 4), np.float32) * np.logspace(-6, 6, 12).reshape(3, 4)
    kernel[:, 1, 2] = 0
    tree = {"final_layer": {"linear": {"kernel": kernel.astype(np.float32)}}}
    left, quant = quantization.quantize(tree, kind, "final_layer/linear")
    shown = np.asarray(quantization.dequantize(left, quant)["final_layer"]["linear"]["kernel"])
    x = np.random.default_rng(1).standard_normal((5, 16), np.float32)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        found = Dense((3, 4), dtype, use_bias=False).apply({"params": {}, "quant": quant["final_layer"]["linear"]}, x)
        exact = np.tensordot(x, shown, axes=1)
        assert found.dtype == dtype
        assert np.all(np.abs(np.asarray(found, np.float32) - exact) <= tolerance * np.abs(exact).max(0))
        assert not found[:, 1, 2].any()


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_gradients_are_those_of_the_dequantised_base(kind):
    """Of a LoRA on top (QLoRA) and of the input; the whole model trains so in test_lora."""
    random = np.random.default_rng(0)
    x, kernel, a, b = (random.standard_normal(shape, np.float32) for shape in ((5, 8), (8, 6), (8, 2), (2, 6)))
    base = {"final_layer": {"linear": {"kernel": kernel}}}
    left, quant = quantization.quantize(base, kind, "final_layer/linear")
    shown = quantization.dequantize(left, quant)

    def loss(x, pair, collections):
        trees = {name: tree["final_layer"]["linear"] for name, tree in collections.items()}
        lora = pair | {"scale": np.full((2, 1), 0.5, np.float32)}
        return jnp.sin(Dense((6,), jnp.float32, use_bias=False).apply(trees | {"lora": lora}, x)).sum()

    found, exact = (jax.grad(loss, argnums=(0, 1))(x, {"a": a, "b": b}, collections)
                    for collections in ({"quant": quant}, {"params": shown}))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), found, exact)


def test_what_cannot_be_done_is_named():
    params, _ = quantization.quantize(loras.params(), targets="single_blocks/qkv")
    lora = adapt.init(CONFIG, jax.random.key(0), loras.RANK, targets="single_blocks/qkv")
    with pytest.raises(ValueError, match="quantised kernel cannot be merged into"):
        adapt.merge(params, lora)
    with pytest.raises(ValueError, match="kind is 'int4'; known: int8, float8"):
        quantization.quantize(loras.params(), "int4")
