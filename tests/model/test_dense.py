"""The linear layer in parts, and its bias, whose gradient a TPU takes by a product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax.adapt.quantize import quantize
from acejax.model import dense
from acejax.model.dense import Dense, add_bias


def drawn(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def tpu(y, bias):
    """`add_bias` as a TPU differentiates it."""
    return y + dense._spread(bias, y)


@pytest.mark.parametrize("function", [add_bias, tpu])
@pytest.mark.parametrize("shape, features", [((2, 5), (6,)), ((3,), (2, 4)), ((), (6,)), ((2, 3), (3, 2, 4))])
def test_a_bias_is_added_and_differentiated(shape, features, function):
    y, bias, along = drawn(0, *shape, *features), drawn(1, *features), drawn(2, *shape, *features)
    other = drawn(3, *features)
    leading = tuple(range(len(shape)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # float32's rounding of sums of 6
    close(function(y, bias), y + bias)
    value, tangent = jax.jvp(function, (y, bias), (along, other))
    close(value, y + bias)
    close(tangent, along + other)
    of_y, of_bias = jax.jit(lambda: jax.vjp(function, y, bias)[1](along))()
    np.testing.assert_array_equal(of_y, along)
    close(of_bias, along.sum(leading))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_tpu_alone_takes_the_product(platform):
    def gradient(y, bias):
        return jax.grad(lambda bias: jnp.square(add_bias(y, bias)).sum())(bias)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 128, 256), (256,)))
    program = jax.export.export(jax.jit(gradient), platforms=[platform])(*shapes).mlir_module()
    assert ("stablehlo.dot_general" in program) == (platform == "tpu")


def test_a_program_of_the_value_alone_has_no_product():
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 128, 256), (256,)))
    assert "dot_general" not in jax.export.export(jax.jit(add_bias), platforms=["tpu"])(*shapes).mlir_module()


LORA = {"a": drawn(5, 8, 2), "b": drawn(6, 2, 3, 2, 4), "scale": jnp.full((2, 1), 0.5)}


@pytest.mark.parametrize("extra", [{}, {"lora": LORA}])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_parts_are_what_comes_apart(extra, eight_bits):
    """Each part is one of the first axis of features, the others flat."""
    x = drawn(0, 2, 5, 8)
    params = {"kernel": drawn(1, 8, 3, 2, 4), "bias": drawn(2, 3, 2, 4)}
    trees = {"params": params} | extra
    if eight_bits:
        left, quant = quantize({"double_blocks": {"img": {"qkv": jax.tree.map(lambda leaf: leaf[None], params)}}})
        trees |= {name: jax.tree.map(lambda leaf: leaf[0], tree["double_blocks"]["img"]["qkv"])
                  for name, tree in (("params", left), ("quant", quant))}
    make = functools.partial(Dense, (3, 2, 4), jnp.float32)
    parts = make(parts=True).apply(trees, x)
    whole = make().apply(trees, x)
    assert [part.shape for part in parts] == [(2, 5, 8)] * 3
    np.testing.assert_allclose(jnp.stack(parts, 2).reshape(whole.shape), whole, rtol=1e-5, atol=1e-5)
    assert jax.tree.map(jnp.shape, make(parts=True).init(jax.random.key(0), x)["params"]) == jax.tree.map(
        jnp.shape, params)


@pytest.mark.parametrize("parts", [False, True])
def test_kernels_are_gathered_by_their_paths(parts):
    """Kernel and LoRA factors are, once each, and what is multiplied is what comes back; biases are not."""
    seen = []

    def gather(kernel, path):
        seen.append((path, kernel.shape))
        return 0 * kernel

    layer = Dense((3, 2, 4), jnp.float32, parts=parts, gather=gather, name="qkv")
    trees = {"params": {"kernel": drawn(1, 8, 3, 2, 4), "bias": jnp.ones((3, 2, 4))}, "lora": LORA}
    made = jax.tree.leaves(layer.apply(trees, drawn(0, 2, 5, 8)))
    assert all((part == 1).all() for part in made)
    names = sorted((path.split("/")[-1], shape) for path, shape in seen)
    assert names == ([("a", (8, 2)), ("b_parts", (2, 3, 8)), ("kernel_parts", (8, 3, 8))] if parts else
                     [("a", (8, 2)), ("b", (2, 3, 2, 4)), ("kernel", (8, 3, 2, 4))])


@pytest.mark.parametrize("parts", [False, True])
def test_gradients_are_summed_in_float32(parts):
    """What bfloat16 can't hold of a sum over 4,096 tokens: 1 and many 2^-9 beside it."""
    layer = functools.partial(Dense, (3, 4) if parts else (12,), jnp.bfloat16, parts=parts)
    x = jnp.full((4096, 8), 2.0**-9).at[0].set(1.0)
    params = layer().init(jax.random.key(0), x)

    def gradients(**more):
        def total(params):
            return sum(part.astype(jnp.float32).sum() for part in jax.tree.leaves(layer(**more).apply(params, x)))
        return jax.jit(jax.value_and_grad(total))(params)

    (value, exact), (same, rounded) = gradients(reduce_dtype=jnp.float32), gradients()
    assert value == same, "the forward pass is the same"
    np.testing.assert_array_equal(exact["params"]["kernel"], np.full(exact["params"]["kernel"].shape, 1 + 4095 / 512))
    np.testing.assert_array_equal(exact["params"]["bias"], np.full(exact["params"]["bias"].shape, 4096))
    assert (rounded["params"]["kernel"] == jnp.bfloat16(1 + 4095 / 512)).all()


@pytest.mark.parametrize("extra", [{}, {"lora": {name: LORA[name] for name in LORA}}])
def test_summing_in_float32_is_the_same_gradient(extra):
    x = drawn(0, 2, 5, 8)
    plain, other = Dense((3, 2, 4), jnp.float32, parts=True), Dense((3, 2, 4), jnp.float32, parts=True,
                                                                    reduce_dtype=jnp.float32)
    variables = {"params": plain.init(jax.random.key(1), x)["params"]} | extra

    def gradient(layer):
        return jax.grad(lambda variables, x: sum(jnp.sin(part).sum() for part in layer.apply(variables, x)), (0, 1))(
            variables, x)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gradient(other), gradient(plain))


def test_a_kernel_that_is_held_flat():
    x, params = drawn(0, 2, 5, 8), {"kernel": drawn(1, 8, 3, 2, 4), "bias": drawn(2, 3, 2, 4)}
    held = dense.flattened({"qkv": params})["qkv"]
    assert {name: leaf.shape for name, leaf in held.items()} == {"flat": (8, 24), "bias": (3, 2, 4)}
    layer = Dense((3, 2, 4), jnp.float32)
    found, whole = (layer.apply({"params": tree}, x) for tree in (held, params))
    np.testing.assert_allclose(found, whole, rtol=1e-6, atol=1e-6)
