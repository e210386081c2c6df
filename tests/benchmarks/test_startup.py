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


def test_a_run_is_started_with_saved_executables_as_well(tmp_path, monkeypatch):
    """Each kind first and then again, of which the median is told; an edit has no step to save."""
    def start(place, argv, environment=None):
        started.append((place.name, [arg for arg in argv if "executables" in arg]))
        return {"seconds": float(len(started)), "programs": 9, "compiled": 0}

    monkeypatch.setattr(startup, "start", start)
    monkeypatch.setattr(startup.shutil, "rmtree", lambda path: None)
    started = []
    found = startup._measure(tmp_path, startup._train, 2)
    own, others = f"--executables={tmp_path / 'saved executable' / 'steps'}", ["ours", "jax's thresholds"]
    assert started == 3 * [*((name, []) for name in others), ("saved executable", [own])]
    assert found["first, saved executable"]["seconds"] == 3 and found["second, saved executable"]["seconds"] == 7.5
