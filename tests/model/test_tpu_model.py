"""The model with the TPU's kernels: interpreted on a CPU, and lowered for a TPU."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acejax
from acejax.model import joint
from acejax.model.mmdit import example
from acejax.model.rope import rotations
from acejax.parallel import rules
from acejax.parallel.mesh import AXES, abstract_mesh

CONFIG = acejax.MMDiTConfig(in_channels=64, out_channels=16, hidden_size=256, num_heads=2, depth=1,
                            depth_single_blocks=2, mlp_ratio=1.0, context_in_dim=32, vec_in_dim=16)
IMAGE = 256
KERNELS = ("attention", "rotate", "norm")


@pytest.fixture(scope="module")
def params():
    """None of them 0: modulation and output take part."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(acejax.init, CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.1 * random.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


def tokens(text, lengths):
    random = np.random.default_rng(1)
    drawn = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype),
                         example(CONFIG, 2, IMAGE, text))
    grid = np.indices((1, 16, IMAGE // 16)).reshape(3, -1).T.astype(np.int32)
    return dataclasses.replace(drawn, positions=np.tile(grid, (2, 1, 1)), sigma=np.array([0.2, 0.8], np.float32),
                               guidance=np.ones(2, np.float32),
                               lengths=None if lengths is None else np.array(lengths, np.int32))


def made(params, tokens, execution):
    """The velocity of valid tokens, and the gradient of its sum of squares by all parameters."""
    valid = jnp.arange(IMAGE) < (jnp.full(2, IMAGE) if tokens.lengths is None else tokens.lengths)[:, None]

    def loss(params):
        velocity = jnp.where(valid[:, :, None], acejax.apply(CONFIG, params, tokens, execution=execution), 0)
        return jnp.square(velocity).sum(), velocity

    (_, velocity), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return velocity, gradient


@pytest.mark.parametrize("lengths", [None, (256, 70)])
@pytest.mark.parametrize("text", [128, 40])  # the kernels take all of it, and attention and the image alone
def test_the_model_is_that_of_xla(text, lengths, params, interpreted):
    seen = tokens(text, lengths)
    found = made(params, seen, acejax.Execution(attention="flash", chip="v6e"))
    expected = made(params, seen, acejax.Execution(attention="xla"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * float(jnp.abs(other).max()))
        assert jnp.any(other != 0)


@pytest.mark.parametrize("lengths", [None, (256, 100)])
def test_joint_attention_is_padded_at_its_end(lengths, interpreted, monkeypatch):
    """Where tokens do not fall into large blocks; here 256 to 384."""
    monkeypatch.setattr("acejax.model.tpu.attention.padded", lambda tokens: tokens + 128)
    random = np.random.default_rng(2)
    streams = [joint.Heads(*random.normal(size=(3, 2, 128, 128)).astype(np.float32)) for _ in range(2)]
    scales = [tuple(random.normal(size=(2, 128)).astype(np.float32)) for _ in streams]
    rope = rotations(random.integers(0, 20, (2, 256, 3)), CONFIG.axes_dim, CONFIG.theta)
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    valid = jnp.arange(256) < (jnp.full(2, 256) if lengths is None else lengths)[:, None]

    def made(attention):
        def total(streams, scales):
            out = joint.attend(streams, scales, rope, lengths, acejax.Execution(attention=attention))
            out = jnp.where(valid[:, :, None], out, 0)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(streams, scales)

    for one, other in zip(jax.tree.leaves(made("flash")), jax.tree.leaves(made("xla")), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, float(jnp.abs(other).max())))


@pytest.mark.parametrize("changes", [{"num_heads": 4, "axes_dim": (8, 28, 28)}, {"num_heads": 1, "axes_dim": (
    32, 112, 112)}])
def test_other_heads_are_refused(changes):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=f"flash takes heads of 128, not {config.head_dim}"):
        jax.eval_shape(functools.partial(acejax.apply, config, execution=acejax.Execution(attention="flash")),
                       jax.eval_shape(acejax.init, config, jax.random.key(0)), example(config, 1, 128, 128))


def loss(params, tokens, config, execution):
    return acejax.apply(config, params, tokens, execution=execution).astype(jnp.float32).sum()


def lowered(execution, gradient=True, text=128, config=CONFIG, batch=2, image=IMAGE, export=True):
    """StableHLO for a TPU."""
    function = jax.jit(functools.partial(jax.grad(loss) if gradient else loss, config=config, execution=execution))
    inputs = (jax.eval_shape(acejax.init, config, jax.random.key(0)),
              example(config, batch, image, text, jnp.bfloat16))
    if export:
        return jax.export.export(function, platforms=["tpu"])(*inputs).mlir_module()
    return function.trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()


def calls(program):
    """How often each kernel is called in a program's text, where each stack's block stands once."""
    lines = [line for line in program.splitlines() if "@tpu_custom_call" in line]
    found = Counter(re.search(r'kernel_name = "(\w+)"', line)[1] for line in lines)
    assert found.total() == len(lines)
    return found


EXECUTION = acejax.Execution(jnp.bfloat16, "flash")


def test_a_forward_pass_lowers_for_tpu():
    """A double block has 2 norms a stream and turns 2 streams, a single block one each; the output has a norm too."""
    assert calls(lowered(EXECUTION, gradient=False)) == {
        "attention_forward": 2, "rotate_forward": 2 + 1, "norm_forward": 4 + 1 + 1}


def test_text_of_any_length_lowers_for_tpu():
    """Streams that do not fall into tiles are normed and turned by XLA; attention pads itself. Of 40 + 256 tokens the
    image's norms are the kernel's: 2 in the double block and the output's."""
    assert calls(lowered(EXECUTION, gradient=False, text=40)) == {"attention_forward": 2, "norm_forward": 3}


@pytest.mark.parametrize("remat, forward", [("none", 2), ("full", 2 * 2), ("attention", 2)])
def test_a_gradient_lowers_for_tpu_and_attention_is_kept(remat, forward):
    """With "attention" its forward kernel does not run again in the backward pass, with "full" it does."""
    found = calls(lowered(dataclasses.replace(EXECUTION, remat=remat)))
    assert found["attention_forward"] == forward
    assert found["attention_backward"] == 2
    assert {f"{name}_{way}" for name in KERNELS for way in ("forward", "backward")} == set(found)


def test_a_gradient_lowers_on_a_mesh_for_tpu():
    """Each device's kernels have its own samples (8 over data x fsdp); attention has its heads (8 over tensor x seq) of
    all tokens, norms all features of its tokens (512 and 256 over seq)."""
    mesh = abstract_mesh(dict.fromkeys(AXES, 2), 16)
    config = dataclasses.replace(CONFIG, hidden_size=1024, num_heads=8)
    execution = dataclasses.replace(EXECUTION, constrain=rules.constrain(mesh), gather=rules.gather(mesh),
                                    share=rules.share(mesh))
    program = lowered(execution, config=config, batch=8, image=512, text=256, export=False)
    assert calls(program) == calls(lowered(EXECUTION))
    for line in program.splitlines():
        if "@tpu_custom_call" in line:
            kernel = re.search(r'kernel_name = "(\w+)_\w+"', line)[1]
            shapes = {"attention": ["2x768x256"], "rotate": ["2x768x256"], "norm": ["2x256x1024", "2x128x1024",
                                                                                  "2x384x1024"]}[kernel]
            assert any(f"tensor<{shape}xbf16>" in line for shape in shapes), line
