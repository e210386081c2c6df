"""What is told of a compiler's errors, and of an environment without one."""

import importlib.util

import pytest

from acejax import UserError
from acejax.aot import compiler
from acejax.cli.main import main
from acejax.parallel.chips import CHIPS, topology
from tests.aot.libtpu import needs_libtpu


def test_a_program_that_does_not_fit():
    error = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
             "HLO temporaries (93.15G) exceeds available HBM (31.24G). HLO module: jit_train_step.\n\nTotal hbm usage")
    told = compiler.explain(error, CHIPS["v6e"])
    assert "does not fit into a device's memory of 31.24 GiB" in told and "temporaries (93.15G)" in told
    assert "remat=full" in told and "lora.base=int8" in told and "\n" not in told
    assert "memory (RESOURCE_EXHAUSTED" in compiler.explain(error, None)


@pytest.mark.parametrize("error", ["INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape cast",
                                   "Ran out of memory in memory space vmem while allocating on stack"])
def test_a_kernel_that_does_not_compile(error):
    told = compiler.explain(error, CHIPS["v5e"])
    assert "a kernel does not compile for this chip" in told and "attention=xla_chunked" in told and error in told


def test_any_other_error_is_told_by_its_first_line():
    assert compiler.explain("INTERNAL: something\nstack\nstack", None) == (
        "the program does not compile (INTERNAL: something)")


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs libtpu, which is not installed here; `make aot` makes"):
        compiler.check()


@pytest.mark.parametrize("name", ["h100x8", "cpu:8"])
def test_only_tpus_are_compiled_for(name):
    with pytest.raises(UserError, match="only TPUs can be compiled for without one"):
        compiler.devices(topology(name))


def test_kernels_are_shared_by_cores():
    report = compiler.Report(
        topology="v5p-8", versions={}, options={}, compile_seconds=1.0, peak=1, limit=None, arguments=1, temporaries=1,
        cycles=1000, kernels={"a": compiler.Kernel(3, 100), "b": compiler.Kernel(1, 50)}, cores=2, clock=1e3,
        collectives={}, zero_gathers=0.0, top=())
    assert report.kernel_cycles == 175 and report.total == 1175 and report.seconds == 1.175
    assert report.to_json()["kernel_cycles"] == 175


@needs_libtpu
def test_a_step_that_does_not_fit(capsys):
    small = {"hidden_size": 512, "num_heads": 4, "depth": 2, "depth_single_blocks": 2}
    changed = [f"--config.model.{name}={size}" for name, size in small.items()]
    assert main(["plan", "--config=ace_plus.py:v5e-1", "--topology=v5e-1", "--tokens=4096", "--text=512",
                 "--samples=1024", "--compile", *changed]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "does not fit into a device's memory of 15.75 GiB (RESOURCE_EXHAUSTED" in told
