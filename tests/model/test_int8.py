"""Products of int8 against plain formulas, in a layer and in a whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acejax
from acejax import Execution, MMDiTConfig
from acejax.adapt.quantize import _some_tokens, dequantize, quantize
from acejax.model import int8
from acejax.model.dense import Dense, parts_first


def drawn(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_product_is_that_of_whole_numbers():
    x, q = drawn(0, 2, 5, 64), jax.random.randint(jax.random.key(1), (64, 3, 4), -127, 128, jnp.int8)
    x = x.at[1, 2].set(0.0)  # a token of zeros
    rounded, scale = int8.round_tokens(x)
    assert rounded.dtype == jnp.int8 and int(jnp.abs(rounded).max()) == 127 and scale.shape == (2, 5, 1)
    np.testing.assert_allclose(rounded * scale, x, atol=float(scale.max()) / 2 + 1e-6)
    whole = np.einsum("bsi,ipo->bspo", np.asarray(rounded, np.int64), np.asarray(q, np.int64))
    np.testing.assert_allclose(int8.product(x, q), whole * np.asarray(scale)[..., None], rtol=1e-6)
    assert jnp.isnan(int8.product(x.at[0, 1, 3].set(jnp.nan), q)[0, 1]).all(), "what is not finite stays so"
    error = int8.product(x, q) - jnp.tensordot(x, q.astype(jnp.float32), axes=1)
    assert float(jnp.sqrt(jnp.square(error).mean()) / jnp.tensordot(x, q.astype(jnp.float32), axes=1).std()) < 0.01


def test_the_gradient_is_that_without_rounding():
    x, q = drawn(0, 2, 5, 8), jax.random.randint(jax.random.key(1), (8, 3, 4), -127, 128, jnp.int8)
    along = drawn(2, 2, 5, 3, 4)
    (found,) = jax.vjp(lambda x: int8.product(x, q), x)[1](along)
    np.testing.assert_allclose(found, jnp.einsum("bspo,ipo->bsi", along, q.astype(jnp.float32)), rtol=1e-5)


@pytest.mark.parametrize("held", [lambda tree: tree, parts_first])
def test_a_layer_of_parts(held):
    x = drawn(0, 2, 5, 64)
    q, scale = jax.random.randint(jax.random.key(1), (64, 3, 2, 4), -127, 128, jnp.int8), jnp.ones((3, 2, 4)) / 500
    layer = Dense((3, 2, 4), jnp.float32, parts=True, int8_products=True, use_bias=False)
    found = layer.apply({"quant": held({"qkv": {"q": q, "scale": scale}})["qkv"], "params": {}}, x)
    wanted = int8.product(x, q) * scale
    np.testing.assert_allclose(jnp.stack(found, -2), wanted.reshape(2, 5, 3, 8), rtol=1e-5, atol=1e-6)


@functools.cache
def model():
    config = MMDiTConfig.tiny()
    params = acejax.init(config, jax.random.key(0))
    draw = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return config, jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(draw), leaf.shape), params)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_model_with_products_of_int8(kind):
    """The velocity is off by little more than with the same kernels dequantised; float8 has no such products."""
    config, params = model()
    tokens, (left, quant) = _some_tokens(config), quantize(params, kind)
    exact = acejax.apply(config, dequantize(left, quant), tokens)
    plain, products = (acejax.apply(config, left, tokens, quant=quant, execution=dataclasses.replace(
        Execution(), int8_products=on)) for on in (False, True))
    error = float(jnp.linalg.norm(products - exact) / jnp.linalg.norm(exact))
    if kind == "float8":
        np.testing.assert_array_equal(products, plain)
    else:
        assert 1e-4 < error < 0.03
