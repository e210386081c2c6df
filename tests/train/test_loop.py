import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import acejax
from acejax import UserError, checkpoint
from acejax.cli import convert
from acejax.train.loop import train
from tests.train.small import STEPS, losses, make_config, make_stream

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Twenty steps without a break."""
    workdir = tmp_path_factory.mktemp("whole")
    train(make_config(), workdir, make_stream())
    return workdir


def test_a_run_is_exported(whole_run, tmp_path):
    """`acejax convert WORKDIR`: the last checkpoint's parameters, without the optimizer's state."""
    assert convert.main([str(whole_run), str(tmp_path / "out.safetensors"), "--to", "bfl"]) == 0
    model = acejax.MMDiTConfig(**make_config().model)
    _, loaded = acejax.load_mmdit(tmp_path / "out.safetensors", model)
    _, stored = checkpoint.load_weights(whole_run)
    jax.tree.map(np.testing.assert_array_equal, loaded, stored)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(loaded["final_layer"]))  # it starts at zero


def test_losses_fall_and_parts_are_reported(whole_run):
    values = losses(whole_run)
    assert len(values) == STEPS and np.mean(values[-3:]) < values[0]
    lines = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert all("L_tar" in line and line["gradient_norm"] > 0 for line in lines)
    assert not any("L_ref/1" in line for line in lines[:STEPS // 2]), "stage 1 has no references"
    assert any("L_ref/1" in line for line in lines) and any("L_ref/2" in line for line in lines)
    assert {name for line in lines for name in line if name.startswith("task/")} == {f"task/{t}" for t in "abrs"}
    assert list(whole_run.glob("events.out.tfevents.*"))


@pytest.mark.soak
def test_an_interrupted_run_has_the_losses_of_an_uninterrupted_one(whole_run, tmp_path):
    train(make_config(), tmp_path, make_stream(), until=7)
    shutil.rmtree(tmp_path / "checkpoints" / "7")  # as killed: what is left was saved while training went on
    changed = make_config()
    changed.execution.remat = "full"  # how a run is computed may change
    train(make_config(), tmp_path, make_stream(), until=13)
    assert losses(tmp_path) == losses(whole_run)[:13]
    train(changed, tmp_path, make_stream(), until=15)
    np.testing.assert_allclose(losses(tmp_path), losses(whole_run)[:15], rtol=1e-5)


def test_lines_after_the_restored_step_are_written_again(whole_run, tmp_path):
    train(make_config(), tmp_path, make_stream(), until=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # what a killed run logged after its last checkpoint
        file.write(json.dumps({"step": 5, "loss": 99.0}) + "\n")
    train(make_config(), tmp_path, make_stream(), until=6)
    assert losses(tmp_path) == losses(whole_run)[:6]


def test_a_workdir_of_another_config_is_refused(whole_run):
    before = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
    other = make_config()
    other.model.num_heads = 4
    other.model.axes_dim = (2, 2, 4)
    with pytest.raises(UserError, match=r"config\.model\.axes_dim = \[4, 6, 6\], this one has \[2, 2, 4\]"):
        train(other, whole_run, make_stream())
    assert before == {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}


def test_mistakes_leave_nothing_behind(tmp_path):
    bad_mesh = make_config()
    bad_mesh.mesh.fsdp = 7
    bad_model = make_config()
    bad_model.model.num_heads = 3
    bad_execution = make_config()
    bad_execution.execution.attention = "fast"
    no_rate, misspelt, uneven = make_config(), make_config(), make_config()
    del no_rate.optimizer.learning_rate
    misspelt.wach = {"every": 1}
    uneven.optimizer.accumulate = 3
    for config, message in ((bad_mesh, "mesh"), (bad_model, "num_heads 3"), (bad_execution, "'fast'; known: auto"),
                            (no_rate, r"config\.optimizer\.learning_rate is missing"),
                            (misspelt, r"config\.wach: no such field; expected seed, steps"),
                            (uneven, "in 3 parts one after the other")):
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "run", make_stream())
    assert not (tmp_path / "run").exists()


def test_a_relative_workdir_and_a_log_cut_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(make_config(), "run", make_stream(), until=4)
    with pathlib.Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(make_config(), "run", make_stream(), until=6)
    assert len(losses(tmp_path / "run")) == 6


def test_what_the_plan_chose_is_told_and_noted(tmp_path, capsys):
    config = make_config()
    config.execution.remat = "auto"
    train(config, tmp_path, make_stream(), until=1)
    assert "config.execution.remat is 'auto': here 'full'" in capsys.readouterr().out  # a CPU tells of no memory
    assert json.loads((tmp_path / "config.json").read_text())["execution"]["remat"] == "auto"
    assert checkpoint.Checkpoints(tmp_path, 1).notes(1)["remat"] == "full"
