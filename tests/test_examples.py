"""The examples run as they are, each in a namespace of its own."""

import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", [name if name == "edit_photo.py" else pytest.param(name, marks=pytest.mark.long)
                                  for name in NAMES])
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "out.png")])
    found = runpy.run_path(str(EXAMPLES / name))
    if name == "own_sampler.py":
        assert found["errors"]["Heun"] < found["errors"]["Euler"]
    if name == "gradients.py":
        assert "red     #" in capsys.readouterr().out
    assert (tmp_path / "out.png").exists() == (name == "edit_photo.py")
