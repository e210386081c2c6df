"""A run that is killed, moved or damaged goes on as if nothing had happened."""

import json
import pathlib
import random
import signal
import time

import numpy as np
import pytest

from tests.counts import COUNTS, count
from tests.train.killed import EVERY, STEPS, Run
from tests.train.small import losses

pytestmark = pytest.mark.long

KILLS = count(1, 20)  # at a moment of the whole run's wall time
SAVES = count((30,), (20, 30, 40, 50, 60))  # and inside the save of these steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Sixty steps without a break, with a warm compile cache, and the seconds they take."""
    folder = tmp_path_factory.mktemp("whole")
    assert Run(folder / "first", until=1).end() == 0  # fills the cache
    started = time.time()
    assert Run(folder / "run").end() == 0, (folder / "run.log").read_text()
    return losses(folder / "run"), time.time() - started


def resumed(workdir: pathlib.Path, **kwargs) -> list[float]:
    run = Run(workdir, **kwargs)
    assert run.end() == 0, run.log.read_text()
    return losses(workdir)


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(whole, tmp_path, number):
    expected, seconds = whole
    run = Run(tmp_path / "run")
    time.sleep(random.Random(number).uniform(0, seconds))
    run.signal(signal.SIGKILL)
    assert run.end() in (-signal.SIGKILL, 0)  # 0: it was faster than the one whose time was taken
    assert resumed(tmp_path / "run") == expected


@pytest.mark.parametrize("step", SAVES)
def test_killed_inside_a_save(whole, tmp_path, step):
    run = Run(tmp_path / "run", fault=f"save {step}")
    assert run.end() == -signal.SIGKILL
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert f"{step}.orbax-checkpoint-tmp" in found and str(step) not in found
    assert resumed(tmp_path / "run") == whole[0]
    assert f"at step {step - EVERY}\n" in run.log.read_text()


def test_the_mesh_changes_on_the_way(whole, tmp_path):
    assert Run(tmp_path / "run", until=30).end() == 0
    found = resumed(tmp_path / "run", fsdp=1)
    assert found[:30] == whole[0][:30]
    np.testing.assert_allclose(found[30:], whole[0][30:], rtol=1e-4)


def test_preempted(whole, tmp_path):
    run = Run(tmp_path / "run")
    run.wait_for("step 7/")
    second = Run(tmp_path / "run")
    assert second.end() == 2
    run.signal(signal.SIGTERM)
    assert run.end() == 75
    log = run.log.read_text()
    assert f"is in use by process {run.process.pid} on " in log
    step = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 7 <= step < STEPS and f"preempted: step {step} is saved; the same command goes on" in log
    notes = json.loads((tmp_path / "run" / "checkpoints" / str(step) / "notes" / "metadata").read_text())
    assert notes["data"]["step"] == step and notes["config"]["model"]["hidden_size"] == 32
    if COUNTS == "full":
        assert resumed(tmp_path / "run") == whole[0]
