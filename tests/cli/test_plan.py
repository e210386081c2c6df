"""`acejax plan`, up to the compiled step of a small model over eight virtual devices."""

import json

import pytest

from acejax.cli.main import main
from tests.counts import count

ACE = ["plan", "--config=ace_plus.py"]
SMALL = ["--config.model.hidden_size=1024", "--config.model.num_heads=8", "--config.model.depth=3",
         "--config.model.depth_single_blocks=5"]


def test_a_slice_of_the_config_s_own(capsys, tmp_path):
    assert main(["plan", "--config=ace_plus.py:v5e-256", "--topology=v5e-256", f"--json={tmp_path / 'plan.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "plan: 256 v5e (fsdp 256); " in printed and "splash attention, remat full" in printed
    found = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert sorted((step["image"], step["samples"]) for step in found["steps"]) == [(4096, 512), (8192, 256)]
    assert all(0.3 < step["mfu"] < 0.5 for step in found["steps"])


def test_what_does_not_fit_is_no_success(capsys):
    assert main([*ACE, "--topology=h100x1", "--tokens=4096"]) == 1
    assert "does not fit: " in capsys.readouterr().out


def test_the_demo_is_planned_by_its_batch_sizes(capsys):
    assert main(["plan", "--config=demo.py", "--topology=cpu:2", "--text=4"]) == 0
    assert "plan: 2 cpu (data 2); 8 samples of 48+4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--topology=NAME is missing"),
    (["--topology=tpu-8"], "topology 'tpu-8' is unknown"),
    (["--topology=cpu:8", "--json=nosuch/plan.json"], "--json=nosuch/plan.json: its folder is not there"),
    (["--topology=v5e-256"], "data.batch_tokens is 65536; expected at least 2097152"),
    (["--topology=cpu:8", "--samples=8"], "--samples needs --tokens"),
    (["--topology=cpu:8", "--tokens=4096", "--samples=12"], "batch size 12 is not a multiple"),
    (["--topology=cpu:8", "--tokens=0"], "tokens"),
    (["--topology=cpu:5", "--tokens=64", "--config.mesh.tensor=5", "--config.mesh.fsdp=1"], "num_heads is 24"),
    (["--topology=h100x8", "--tokens=4096", "--config.execution.attention=cudnn", "--compile"],
     "virtual CPU devices, which have no attention by cudnn"),
])
def test_mistakes(flags, message, capsys):
    assert main([*ACE, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("flags", count([[]], [[], ["--config.mesh.data=2"], ["--config.optimizer.accumulate=2"],
                                              ["--config.mesh.seq=2"]]))
def test_the_plan_is_that_of_the_compiled_step(flags, capfd):
    """Within 10 %, with no gather of a whole stack, and one reduction for each gradient."""
    assert main([*ACE, *SMALL, *flags, "--topology=cpu:8", "--tokens=1920", "--text=128", "--compile"]) == 0
    assert "no gather of a whole stack, one reduction for each gradient" in capfd.readouterr().out
