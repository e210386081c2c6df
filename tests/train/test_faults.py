"""What can go wrong outside the program: one message, a code, and the last good step still restores."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from acejax import UserError, checkpoint
from acejax.workdir import lock
from tests.train.killed import EVERY, Run

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.long
def test_a_disk_that_fills_up_while_saving(tmp_path):
    """The run ends with one line that names the safe step; from there the same command goes on."""
    run = Run(tmp_path / "run", fault="disk")
    assert run.end() == 2
    *_, last = run.log.read_text().splitlines()
    assert last.startswith(f"acejax: {tmp_path}/run/checkpoints: a checkpoint could not be saved (")
    assert "File too large" in last and last.endswith(f"step {EVERY} is safe")
    assert "Traceback" not in run.log.read_text()
    again = Run(tmp_path / "run", until=EVERY + 1)
    assert again.end() == 0 and f"at step {EVERY}\n" in again.log.read_text()
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {str(EVERY), str(EVERY + 1)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run the command as a user who may not write")
def test_a_read_only_workdir(tmp_path):
    """Refused in one line, for a user who may read it and not write."""
    os.chmod(tmp_path, 0o755)
    (tmp_path / "config.json").write_text("{}")
    script = ("import os, sys\nfrom acejax import UserError\nfrom acejax.workdir import lock\nos.setuid(65534)\n"
              "try:\n    with lock(sys.argv[1]): print('held')\nexcept UserError as error: print(error)")
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 1:
            folder.chmod(folder.stat().st_mode | 0o11)  # pytest's own, closed to others
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == (f"workdir {tmp_path} cannot be written: [Errno 13] Permission denied: "
                           f"'{tmp_path}/lock.json'\n"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


@pytest.mark.long
def test_a_batch_with_nan(tmp_path):
    """Its step changes nothing and is counted; the run goes on, and its checkpoint is sound."""
    run = Run(tmp_path / "run", until=EVERY, fault="nan")
    assert run.end() == 0, run.log.read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" not in line] == [7] and len(lines) == EVERY
    assert [line["skipped"] for line in lines] == [float(line["step"] == 7) for line in lines]
    _, params = checkpoint.load_weights(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be written"), lock(tmp_path / "run"):
        raise AssertionError("entered")
