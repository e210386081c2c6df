"""The conversion benchmark: sizes as asked for, and a run on a small model that measures what it says."""

import json

import pytest

from acejax import UserError
from benchmarks import convert
from tests.weights.models import MMDIT


@pytest.mark.parametrize("gb", [2, 8, 24])
def test_the_file_has_the_size_that_was_asked_for(gb):
    assert convert.size(convert.sized(gb)) == pytest.approx(gb * 1e9, rel=0.4 if gb == 2 else 0.1)


def test_a_small_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "sized", lambda gb: MMDIT)
    assert convert.main(["--gb=1", "--repeat=1", f"--folder={tmp_path}", f"--json={tmp_path / 'out.json'}"]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["bytes"] == convert.size(MMDIT)
    assert figures["ways"].keys() == {"to diffusers", "to bfl"}
    for row in figures["ways"].values():
        assert row["speed_of_cp"] == pytest.approx(row["cp_seconds"] / row["convert_seconds"])
        assert 20_000_000 < row["peak_bytes"] <= figures["allowed_peak"]
    assert "of cp" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # nothing large is left behind


@pytest.mark.parametrize("flags", [["--repeat=0"], ["--gb=-1"], ["--folder=nosuch"], ["--gb=900"]])
def test_what_cannot_be_measured_is_said(flags):
    with pytest.raises(UserError):
        convert.main(flags)
