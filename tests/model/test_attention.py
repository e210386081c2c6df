"""The kernels of `acejax.model.attention` that need other hardware, as far as a CPU can tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from acejax.model.attention import _IMPLEMENTATIONS, attention
from acejax.model.config import ATTENTION, Execution
from acejax.parallel import rules
from acejax.parallel.mesh import AXES, abstract_mesh


def abstract(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def export(implementation, platform, size=4608, heads=24, dim=128):
    """StableHLO of one attention call, lowered for a platform that need not be here."""
    qkv = abstract(2, size, heads, dim)
    call = jax.jit(functools.partial(attention, implementation=implementation))
    return jax.export.export(call, platforms=[platform])(qkv, qkv, qkv, abstract(2, dtype=jnp.int32))


@pytest.mark.parametrize("size", [4608, 1000])  # a multiple of the kernel's block, and not
def test_splash_lowers_for_tpu(size):
    exported = export("splash", "tpu", size)
    assert "tpu_custom_call" in exported.mlir_module()
    assert exported.out_avals[0].shape == (2, size, 24, 128)


def test_splash_lowers_with_its_gradient_for_tpu():
    def loss(q, k, v, lengths):
        return attention(q, k, v, lengths, "splash").astype(jnp.float32).sum()

    qkv = abstract(1, 512, 2, 128)
    exported = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=["tpu"])(
        qkv, qkv, qkv, abstract(1, dtype=jnp.int32))
    assert exported.mlir_module().count("tpu_custom_call") >= 2  # forward and backward


def test_splash_lowers_on_a_mesh_for_tpu():
    """Each device's kernels have its own samples (8 over data x fsdp) and heads (24 over tensor x seq)."""
    mesh = abstract_mesh(dict.fromkeys(AXES, 2), 16)
    share = rules.share(mesh)(functools.partial(attention, implementation="splash"))

    def loss(q, k, v, lengths):
        return share(q, k, v, lengths).astype(jnp.float32).sum()

    qkv = abstract(8, 512, 24, 128)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(qkv, qkv, qkv, abstract(8, dtype=jnp.int32))
    calls = [line for line in traced.lower(lowering_platforms=("tpu",)).as_text().splitlines()
             if "tpu_custom_call" in line]
    assert len(calls) >= 2 and all("tensor<2x6x512x128xbf16>" in call for call in calls)


@pytest.mark.parametrize("lengths", [None, (200, 77)])
def test_splash_equals_xla_on_valid_tokens(lengths, monkeypatch):
    """The kernel's own arithmetic, interpreted; 200 tokens are padded to its block."""
    q, k, v = (jax.random.normal(key, (2, 200, 2, 128)) for key in jax.random.split(jax.random.key(0), 3))
    lengths = None if lengths is None else jnp.array(lengths)
    make = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", make)
    found = attention(q, k, v, lengths, "splash")
    expected = attention(q, k, v, lengths, "xla")
    assert np.isfinite(found).all()
    for sample, valid in enumerate([200, 200] if lengths is None else lengths):
        np.testing.assert_allclose(found[sample, :valid], expected[sample, :valid], atol=1e-5)


@pytest.mark.parametrize("size, implementation", [(1024, "xla"), (1025, "xla_chunked")])
def test_auto_goes_by_length_alone(size, implementation):
    """Compared by the program: the same on every host, whatever its devices."""
    q = abstract(1, size, 1, 32)

    def program(name):
        return jax.jit(lambda q: attention(q, q, q, None, name)).lower(q).as_text()

    assert program("auto") == program(implementation)


@pytest.mark.parametrize("name", ["flash", "XLA"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"attention is '{name}'; known: auto, xla, xla_chunked, cudnn, splash"):
        Execution(attention=name)
    with pytest.raises(ValueError, match=name):
        attention(*[jnp.zeros((1, 4, 1, 8))] * 3, implementation=name)


def test_every_known_name_has_an_implementation():
    assert set(ATTENTION) == {"auto", *_IMPLEMENTATIONS}


def test_for_platform_names_the_fast_kernel():
    assert Execution.for_platform("tpu").attention == "splash"
    assert Execution.for_platform("gpu").attention == "cudnn"
    assert Execution.for_platform("cpu") == Execution()
    assert Execution.for_platform("gpu", attention="xla", remat="full") == Execution(jnp.bfloat16, "xla", "full")
    assert Execution.for_platform("gpu", dtype="float32") == Execution("float32", "auto")  # cuDNN has none
    assert Execution.for_platform("tpu", dtype="float32").attention == "splash"
