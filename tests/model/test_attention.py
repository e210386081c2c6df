"""The kernels of `acejax.model.attention` that need other hardware, as far as a CPU can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acejax.model.attention import _IMPLEMENTATIONS, attention
from acejax.model.config import ATTENTION, Execution


def abstract(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def export(implementation, platform, size=4608, heads=24, dim=128):
    """StableHLO of one attention call, lowered for a platform that need not be here."""
    qkv = abstract(2, size, heads, dim)
    call = jax.jit(functools.partial(attention, implementation=implementation))
    return jax.export.export(call, platforms=[platform])(qkv, qkv, qkv, abstract(2, dtype=jnp.int32))


@pytest.mark.parametrize("size", [4608, 1000])  # a multiple of the kernel's block, and not
def test_flash_lowers_for_tpu(size):
    exported = export("flash", "tpu", size)
    assert exported.mlir_module().count("@tpu_custom_call") == 1
    assert exported.out_avals[0].shape == (2, size, 24, 128)


def test_flash_lowers_with_its_gradient_for_tpu():
    def loss(q, k, v, lengths):
        return attention(q, k, v, lengths, "flash").astype(jnp.float32).sum()

    qkv = abstract(1, 512, 2, 128)
    exported = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(
        qkv, qkv, qkv, abstract(1, dtype=jnp.int32))
    assert exported.mlir_module().count("@tpu_custom_call") == 2  # forward and backward


@pytest.mark.parametrize("lengths", [None, (200, 77)])
def test_flash_equals_xla_on_valid_tokens(lengths, interpreted):
    """200 tokens are padded to the kernel's blocks."""
    q, k, v = (jax.random.normal(key, (2, 200, 2, 128)) for key in jax.random.split(jax.random.key(0), 3))
    lengths = None if lengths is None else jnp.array(lengths)
    found = attention(q, k, v, lengths, "flash")
    expected = attention(q, k, v, lengths, "xla")
    assert np.isfinite(found).all()
    for sample, valid in enumerate([200, 200] if lengths is None else lengths):
        np.testing.assert_allclose(found[sample, :valid], expected[sample, :valid], atol=1e-5)


@pytest.mark.parametrize("dim", [64, 256])
def test_flash_refuses_other_heads(dim):
    """Their width may well be a multiple of 128, and the kernel would take heads apart or together."""
    with pytest.raises(ValueError, match=f"flash takes heads of 128, not {dim}"):
        attention(*[jnp.zeros((1, 128, 2, dim))] * 3, implementation="flash")


@pytest.mark.parametrize("size, implementation", [(1024, "xla"), (1025, "xla_chunked")])
def test_auto_goes_by_length_alone(size, implementation):
    """Compared by the program: the same on every host, whatever its devices."""
    q = abstract(1, size, 1, 32)

    def program(name):
        return jax.jit(lambda q: attention(q, q, q, None, name)).lower(q).as_text()

    assert program("auto") == program(implementation)


@pytest.mark.parametrize("name", ["splash", "XLA"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"attention is '{name}'; known: auto, xla, xla_chunked, cudnn, flash"):
        Execution(attention=name)
    with pytest.raises(ValueError, match=name):
        attention(*[jnp.zeros((1, 4, 1, 8))] * 3, implementation=name)


def test_every_known_name_has_an_implementation():
    assert set(ATTENTION) == {"auto", *_IMPLEMENTATIONS}


def test_for_platform_names_the_fast_kernel():
    assert Execution.for_platform("tpu").attention == "flash"
    assert Execution.for_platform("gpu").attention == "cudnn"
    assert Execution.for_platform("cpu") == Execution()
    assert Execution.for_platform("gpu", attention="xla", remat="full") == Execution(jnp.bfloat16, "xla", "full")
    assert Execution.for_platform("gpu", dtype="float32") == Execution("float32", "auto")  # cuDNN has none
    assert Execution.for_platform("tpu", dtype="float32").attention == "flash"
