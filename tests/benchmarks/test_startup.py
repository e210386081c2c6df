"""The recorded figures of `acejax bench startup`, and a command that fails is no figure."""

import json
from pathlib import Path

import pytest

from benchmarks import startup

REPORT = json.loads((Path(startup.__file__).parent / "results" / "startup.json").read_text())


@pytest.mark.parametrize("name", ["edit", "train"])
def test_recorded_figures(name):
    row = REPORT["rows"][name]
    assert row["first"]["compiled"] == row["first"]["programs"] and row["second"]["compiled"] == 0
    assert row["second"]["seconds"] < row["first"]["seconds"] / 1.5
    assert row["second, jax's thresholds"]["compiled"] > 40  # why all programs are kept


def test_a_command_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 2: acejax: picture nosuch.png: no such file"):
        startup.start(tmp_path, ["edit", "--demo", "--image=nosuch.png", "--prompt=x", f"--out={tmp_path / 'o.png'}"])
