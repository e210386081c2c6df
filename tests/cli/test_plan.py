"""`acejax plan`, up to the compiled step of a small model over eight virtual devices."""

import json

import pytest

from acejax.aot import compiler
from acejax.cli import plan as command
from acejax.cli.main import main
from acejax.train.plan_compile import Kinds
from tests.counts import count
from tests.data import drawn

ACE = ["plan", "--config=ace_plus.py"]
SMALL = ["--config.model.hidden_size=1024", "--config.model.num_heads=8", "--config.model.depth=3",
         "--config.model.depth_single_blocks=5"]


def test_a_slice_of_the_config_s_own(capsys, tmp_path):
    assert main(["plan", "--config=ace_plus.py:v5e-256", "--topology=v5e-256", f"--json={tmp_path / 'plan.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "plan: 256 v5e (fsdp 256); " in printed and "flash attention, remat full" in printed
    told = json.loads((tmp_path / "plan.json").read_text())
    found = told["plan"]
    assert sorted((step["image"], step["samples"]) for step in found["steps"]) == [(4096, 512), (8192, 256)]
    assert all(0.55 < step["mfu"] < 0.65 for step in found["steps"])
    assert all(step["seconds"] == step["compute"] + step["exposed"] for step in found["steps"])
    assert told["topology"]["devices"] == 256 and told["topology"]["slices"] == 1
    assert told["run"]["steps"] == 100_000 and told["run"]["hours"] > 24 and told["run"]["price"] is None
    assert told["run"]["checkpoint"] == pytest.approx(12 * 11_902_587_968, rel=1e-6)
    assert told["spare"][0]["change"] == "config.execution.remat=attention,proj,out"
    assert "the run of 100,000 steps:" in printed and "your data   not known: manifest.jsonl: no such file" in printed
    assert "GB of a device are left over" in printed


def test_two_slices_of_the_config_s_own(capsys):
    assert main(["plan", "--config=ace_plus.py:v5e-256x2", "--topology=v5e-256x2", "--price=1.2"]) == 0
    printed = capsys.readouterr().out
    assert "plan: 512 v5e (2 slices, data 2 x fsdp 256); 1024 samples of 4096+512 tokens; " in printed
    assert "  price       " in printed


def test_one_s_own_data_makes_the_buckets(capsys, tmp_path):
    path = drawn.write(tmp_path / "pairs", drawn.samples(7))
    flags = [f"--config.data.sources.mine.path={path}", f"--config.cache.dir={tmp_path / 'cache'}",
             "--config.data.bucket_multiple=4", "--config.data.batch_tokens=80", f"--json={tmp_path / 'plan.json'}"]
    assert main(["plan", "--config=ace_plus.py:one-card", "--topology=b300x1", *flags]) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert max(step["image"] for step in told["plan"]["steps"]) < 80
    assert sum(told["run"]["shares"].values()) == pytest.approx(1) and len(told["run"]["shares"]) > 1
    assert told["run"]["data"] == 7
    assert told["run"]["epochs"] == pytest.approx(told["run"]["samples"] / 7)
    assert "your data   7 samples, " in capsys.readouterr().out


def test_what_does_not_fit_is_no_success(capsys):
    assert main([*ACE, "--topology=h100x1", "--tokens=4096"]) == 1
    assert "does not fit: " in capsys.readouterr().out


def test_the_demo_is_planned_by_its_batch_sizes(capsys):
    assert main(["plan", "--config=demo.py", "--topology=cpu:2", "--text=4"]) == 0
    assert "plan: 2 cpu (data 2); 8 samples of 48+4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--topology=NAME is missing"),
    (["--topology=tpu-8"], "topology 'tpu-8' is unknown"),
    (["--topology=v5e-255"], "there is no such slice; the nearest are v5e-128 (8x16 chips) and v5e-256"),
    (["--topology=v5e-256x2", "--tokens=4096"], "config.mesh: data is 1 over 2 slices"),
    (["--topology=h100x8", "--tokens=4096", "--price=-1"], "price"),
    (["--topology=cpu:8", "--json=nosuch/plan.json"], "--json=nosuch/plan.json: its folder is not there"),
    (["--topology=v5e-256"], "data.batch_tokens is 65536; expected at least 2097152"),
    (["--topology=cpu:8", "--samples=8"], "--samples needs --tokens"),
    (["--topology=cpu:8", "--tokens=4096", "--samples=12"], "batch size 12 is not a multiple"),
    (["--topology=cpu:8", "--tokens=0"], "tokens"),
    (["--topology=cpu:5", "--tokens=64", "--config.mesh.tensor=5", "--config.mesh.fsdp=1"], "num_heads is 24"),
    (["--topology=h100x8", "--tokens=4096", "--compile"], "only TPUs can be compiled for without one, or cpu:N"),
    (["--topology=cpu:8", "--tokens=4096", "--config.execution.attention=cudnn", "--compile"],
     "plan: attention is 'cudnn': cudnn is a kernel for CUDA GPUs, here is a cpu"),
    (["--topology=cpu:8", "--tokens=4096", "--compile", "--save=a.executable"],
     "plan: --save=a.executable goes with --compile and a TPU's topology, here is cpu:8"),
    (["--topology=v6e-8", "--tokens=4096", "--save=a.executable"], "--save=a.executable goes with --compile"),
    (["--topology=v6e-8", "--tokens=4096", "--config.execution.attention=splash"], "attention is 'splash'; known: "),
])
def test_mistakes(flags, message, capsys):
    assert main([*ACE, *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu_nothing_is_planned_first(capsys, monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert main([*ACE, "--topology=v6e-8", "--tokens=4096", "--compile"]) == 2
    told = capsys.readouterr()
    assert "needs libtpu, which is not installed here; `make aot`" in told.err and not told.out


def saving(monkeypatch, *flags):
    """`plan --save` of a step whose compiler is not asked: what it would be asked for."""
    asked = []
    monkeypatch.setattr(compiler, "check", lambda topology=None: None)
    monkeypatch.setattr(command, "_in_child", lambda argv, found, where, kinds: asked.append(kinds) or {"peak": 0})
    monkeypatch.setattr(command.report_table, "table", lambda report, step: "")
    monkeypatch.setattr(command, "_saved", lambda path, found, kinds: "saved")
    code = main([*ACE, "--topology=v6e-8", "--tokens=512", *SMALL, "--compile", *flags])
    return code, asked


def test_what_is_saved_is_of_the_data(tmp_path, monkeypatch, capsys):
    file = f"--save={tmp_path / 'a.executable'}"
    rows = drawn.write(tmp_path / "data", drawn.samples(6))
    assert saving(monkeypatch, file, f"--config.data.sources.mine.path={rows}") == (0, [Kinds(2, 2, True, "bfloat16")])
    given = ["--tasks=5", "--references=3", "--config.cache.dtype=float32"]
    assert saving(monkeypatch, file, *given) == (0, [Kinds(3, 5, True, "float32")])
    capsys.readouterr()
    assert saving(monkeypatch, file) == (2, [])
    assert "--save needs the data's tasks and references, which are not known (manifest.jsonl: no such file" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("path, told", [
    ("a.bin", "--save=a.bin: expected a name that ends in .executable"),
    ("nosuch/a.executable", "--save=nosuch/a.executable: its folder is not there"),
])
def test_places_where_no_step_can_be_saved(monkeypatch, capsys, path, told):
    assert saving(monkeypatch, f"--save={path}", "--tasks=1", "--references=0") == (2, [])
    assert told in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("flags", count([[]], [[], ["--config.mesh.data=2"], ["--config.optimizer.accumulate=2"],
                                              ["--config.mesh.seq=2"]]))
def test_the_plan_is_that_of_the_compiled_step(flags, capfd):
    """Within 10 %, with no gather of a whole stack, and one reduction for each gradient."""
    assert main([*ACE, *SMALL, *flags, "--topology=cpu:8", "--tokens=1920", "--text=128", "--compile"]) == 0
    assert "no gather of a whole stack, one reduction for each gradient" in capfd.readouterr().out
