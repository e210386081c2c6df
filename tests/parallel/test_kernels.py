"""Attention is chosen by the devices of the mesh, told where it is slow, refused where it is not there."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acejax
from acejax.edit.sampler import Sampler
from acejax.errors import UserError
from acejax.model.attention import resolve
from acejax.parallel import kernels
from acejax.parallel.chips import topology
from acejax.parallel.mesh import make_mesh
from acejax.train import loop
from acejax.train.config import ExecutionConfig, OptimizerConfig, TrainConfig
from acejax.train.plan import plan
from acejax.train.program import Program
from tests.train import small


def device(platform, version, kind):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform=platform, client=client, device_kind=kind)


CUDA = device("gpu", "PJRT C API\ncuda 12090", "NVIDIA H100 80GB HBM3")
ROCM = device("gpu", "rocm 60200", "AMD Instinct MI300X")
TPU, CPU = device("tpu", "PJRT C API\nTFRT TPU v6 lite", "TPU v6 lite"), device("cpu", "cpu", "cpu")
HEADS = {"num_heads": 1, "axes_dim": (16, 56, 56)}  # of a tiny model, as wide as the TPU's kernel takes them


@pytest.mark.parametrize("platform, tokens, dtype, head_dim, chosen", [
    ("tpu", None, "bfloat16", 128, "flash"), ("tpu", 64, "float32", 128, "flash"),
    ("tpu", None, "bfloat16", 32, "auto"), ("tpu", 1024, "bfloat16", 32, "xla"),
    ("tpu", 1025, "bfloat16", 256, "xla_chunked"),
    ("gpu", None, "bfloat16", 128, "cudnn"), ("gpu", 4608, "float16", 32, "cudnn"),
    ("gpu", 4608, "float32", 128, "xla_chunked"), ("gpu", 1024, "float32", 128, "xla"), ("gpu", None, "float32", 128,
                                                                                         "auto"),
    ("gpu", 4608, "bfloat16", 100, "xla_chunked"), ("gpu", 4608, "bfloat16", 256, "xla_chunked"),
    ("tpu", 4608, "float16", 128, "xla_chunked"),
    ("cpu", None, "bfloat16", 128, "auto"), ("cpu", 1024, "bfloat16", 128, "xla"), ("cpu", 1025, "bfloat16", 128,
                                                                                    "xla_chunked"),
    ("rocm", 4608, "bfloat16", 128, "xla_chunked"),
])
def test_auto_is_the_fast_kernel_that_the_platform_has(platform, tokens, dtype, head_dim, chosen):
    assert resolve("auto", platform, tokens, dtype, head_dim) == chosen
    assert resolve("xla", platform, tokens, dtype, head_dim) == "xla"


@pytest.mark.parametrize("kinds, refused", [(["device", "pinned_host"], False), (["device", "unpinned_host"], True)])
def test_what_is_saved_on_a_host_needs_its_memory(kinds, refused):
    where = types.SimpleNamespace(**vars(TPU), addressable_memories=lambda: [
        types.SimpleNamespace(kind=kind) for kind in kinds])
    kernels.check_host("attention,out", TPU)  # nothing is asked
    if not refused:
        return kernels.check_host("attention:host", where)
    with pytest.raises(UserError, match=r"config.execution.remat is 'out:host': a tpu can't copy into its host's "
                                        r"memory by itself \(of the kinds device, unpinned_host none is pinned_host\)"):
        kernels.check_host("out:host", where, "config.execution.")


@pytest.mark.parametrize("where, dtype, chosen", [
    (TPU, "bfloat16", "flash"), (CUDA, "bfloat16", "cudnn"), (CUDA, "float32", "auto"), (ROCM, "bfloat16", "auto"),
    (CPU, "float32", "auto")])
def test_a_device_says_what_auto_is(where, dtype, chosen):
    assert kernels.choose("auto", where, dtype) == chosen


@pytest.mark.parametrize("name, where, dtype, message", [
    ("cudnn", CPU, "bfloat16", "config.execution.attention is 'cudnn': cudnn is a kernel for CUDA GPUs, here is a cpu; "
                               "expected auto, which takes xla or xla_chunked there"),
    ("cudnn", ROCM, "bfloat16", "here is a rocm"),
    ("cudnn", TPU, "bfloat16", "expected auto, which takes flash there"),
    ("flash", CUDA, "bfloat16", "flash is a kernel for TPUs, here is a gpu; expected auto, which takes cudnn there"),
    ("cudnn", CUDA, "float32", "cudnn takes bfloat16 and float16, not float32; expected auto"),
    ("xla", CPU, "float16", "config.execution.dtype is 'float16': float16 is for GPUs, a cpu has no attention in it; "
                            "expected bfloat16 or float32"),
    ("auto", TPU, "float16", "config.execution.dtype is 'float16'"),
])
def test_what_a_device_does_not_have_is_told(name, where, dtype, message):
    with pytest.raises(UserError) as told:
        kernels.choose(name, where, dtype, where="config.execution.")
    assert message in str(told.value) and "\n" not in str(told.value)


def test_float16_attention_is_refused_by_xla_on_a_cpu():
    """Else there would be no reason to refuse it before: this tells when there is none any more."""
    q = jnp.zeros((1, 8, 1, 8), jnp.float16)
    with pytest.raises(Exception, match="not supported"):
        jax.block_until_ready(jax.jit(lambda q: acejax.model.attention.attention(q, q, q))(q))


@pytest.mark.parametrize("name, where, tokens, dtype, message", [
    ("xla_chunked", TPU, 4608, "bfloat16", "attention of 4,608 tokens goes slowly, by xla_chunked on a tpu: "
                                           "config.execution.attention is 'xla_chunked'; 'auto' takes flash"),
    ("xla", CUDA, 1025, "bfloat16", "'auto' takes cudnn"),
    ("auto", CUDA, 4608, "float32", "by xla_chunked on a gpu: cudnn takes bfloat16 and float16, not float32: "
                                    "config.execution.dtype is 'float32'; with 'bfloat16' it is cudnn"),
    ("xla", CUDA, 4608, "float32", "with 'bfloat16' and config.execution.attention='auto' it is cudnn"),
    ("auto", TPU, 4608, "bfloat16", ""), ("auto", CUDA, 4608, "bfloat16", ""),  # fast
    ("xla", TPU, 1024, "bfloat16", ""), ("auto", CUDA, 1024, "float32", ""),  # short
    ("xla_chunked", CPU, 4608, "bfloat16", ""), ("auto", ROCM, 4608, "bfloat16", ""),  # there is no other
])
def test_a_slow_way_is_told_in_a_line_and_once(name, where, tokens, dtype, message, capsys):
    kernels._once.cache_clear()
    for _ in range(2):
        kernels.warn_slow(name, where, tokens, dtype, where="config.execution.")
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == bool(message)


@pytest.mark.parametrize("where, heads, message", [
    (CUDA, 100, "by xla_chunked on a gpu: cudnn takes heads of 8 to 128 in steps of 8, not 100\n"),
    (TPU, 64, "by xla_chunked on a tpu: flash takes heads of 128, not 64\n")])
def test_heads_that_no_kernel_takes_are_told_without_a_cure(where, heads, message, capsys):
    kernels._once.cache_clear()
    kernels.warn_slow("auto", where, 4608, "bfloat16", heads)
    assert capsys.readouterr().err.endswith(message)


def test_heads_that_a_named_kernel_does_not_take_are_refused():
    with pytest.raises(UserError, match="^attention is 'flash': flash takes heads of 128, not 64; expected auto, which "
                                        "takes xla or xla_chunked there$"):
        kernels.choose("flash", TPU, "bfloat16", 64)


@pytest.mark.parametrize("where, chip, chosen", [(TPU, "v6e", "flash"), (CUDA, "h100", "cudnn"), (CPU, "", "auto")])
def test_an_execution_is_for_its_devices(where, chip, chosen, monkeypatch):
    """Of a mesh it has the hooks too, and what was asked for stays."""
    monkeypatch.setattr(kernels, "device_of", lambda mesh: where)
    asked, config = acejax.Execution(jnp.bfloat16, remat="full"), acejax.MMDiTConfig.tiny(**HEADS)
    alone = kernels.on_devices(asked, config)
    assert alone == dataclasses.replace(asked, attention=chosen, chip=chip)
    shared = kernels.on_devices(asked, config, make_mesh({"data": 1}, jax.devices()[:1]))
    assert all(getattr(shared, hook) is not getattr(asked, hook) for hook in ("constrain", "gather", "share"))
    hooks = {hook: getattr(asked, hook) for hook in ("constrain", "gather", "share")}
    assert dataclasses.replace(shared, **hooks) == alone


RUN = TrainConfig(seed=0, steps=1, model=acejax.MMDiTConfig.tiny(in_channels=448, **HEADS),
                  optimizer=OptimizerConfig(learning_rate=1e-3), execution=ExecutionConfig(dtype="bfloat16"))


@pytest.mark.parametrize("where, chosen", [(TPU, "flash"), (CUDA, "cudnn"), (CPU, "auto")])
def test_a_runs_program_goes_by_its_mesh(where, chosen, monkeypatch):
    """Ahead of time the mesh is of devices that are not here."""
    monkeypatch.setattr(kernels, "device_of", lambda mesh: where)
    program = Program.of(RUN, make_mesh({"data": 1}, jax.devices()[:1]), 0, 1)
    assert program.setting.execution.attention == chosen


@pytest.mark.parametrize("name, chosen", [("v6e-1", "flash"), ("h100x1", "cudnn"), ("cpu:1", "xla_chunked")])
def test_a_plan_agrees_with_its_program(name, chosen):
    there = topology(name)
    assert plan(RUN, {4096: 1}, 512, there.chip, there.devices).largest.attention == chosen


def test_a_plan_of_float32_on_a_gpu_has_no_cudnn_and_advises_none():
    run = dataclasses.replace(RUN, model=acejax.MMDiTConfig(), mesh={"fsdp": -1},
                              execution=ExecutionConfig(dtype="float32"))
    there = topology("h100x2")
    found = plan(run, {4096: 2}, 512, there.chip, there.devices)
    assert found.largest.attention == "xla_chunked" and not found.fits and "cudnn" not in found.advice


@pytest.mark.parametrize("where, dtype, chosen", [(TPU, "float32", "flash"), (CUDA, "bfloat16", "cudnn"),
                                                  (CUDA, "float32", "auto"), (CPU, "float32", "auto")])
def test_a_sampler_goes_by_its_devices(where, dtype, chosen, monkeypatch):
    config = acejax.MMDiTConfig.tiny(in_channels=64, **HEADS)
    params = acejax.init(config, jax.random.key(0))
    monkeypatch.setattr(kernels, "device_of", lambda mesh: where)
    assert Sampler(config, params, execution=acejax.Execution(dtype)).execution.attention == chosen


def test_a_sampler_refuses_a_kernel_that_is_not_here():
    config = acejax.MMDiTConfig.tiny(in_channels=64, **HEADS)
    with pytest.raises(UserError, match="^attention is 'flash': flash is a kernel for TPUs, here is a "):
        Sampler(config, {}, execution=acejax.Execution(attention="flash"))


def test_a_sampler_tells_of_a_slow_way(monkeypatch, capsys):
    """1,024 tokens of a picture and 8 of text, as on a GPU; the program itself is the CPU's."""
    kernels._once.cache_clear()
    config = acejax.MMDiTConfig.tiny(in_channels=64)
    sampler = Sampler(config, acejax.init(config, jax.random.key(0)))
    sampler._device = CUDA
    features = {"text": np.zeros((1, 8, config.context_in_dim), np.float32),
                "pooled": np.zeros((1, config.vec_in_dim), np.float32)}
    sampler(features, np.zeros((1, 64, 64, 16), np.float32), 1)
    assert "attention of 1,032 tokens goes slowly, by xla_chunked on a gpu" in capsys.readouterr().err


def test_the_device_is_where_arrays_go():
    assert kernels.device_of() == next(iter(jnp.zeros(1).devices()))
    last = jax.devices()[-1]
    assert kernels.device_of(make_mesh({"data": 1}, [last])) == last and kernels.platform_of(last) == last.platform


def test_a_run_tells_of_its_longest_sequence(tmp_path, monkeypatch):
    """Before the step is compiled."""
    def told(*arguments):
        raise InterruptedError(arguments)

    monkeypatch.setattr(kernels, "warn_slow", told)
    with pytest.raises(InterruptedError) as found:
        loop.train(small.make_config(), tmp_path, small.make_stream())
    assert found.value.args[0] == ("auto", jax.devices()[0], 12 + 3, "float32", 16, "config.execution.")
