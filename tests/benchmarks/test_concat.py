"""`acejax bench` and its concat figure, at a size that says nothing about time."""

import json

import pytest

from acejax.cli import bench
from acejax.errors import UserError


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concat")
    files = folder / "concat.json", folder / "concat.png"
    assert bench.main(["concat", "--cpu", "--tokens", "4", "--text", "2", "--repeats", "1",
                       "--json", str(files[0]), "--plot", str(files[1])]) == 0
    return files


@pytest.fixture(scope="module")
def report(outputs):
    return json.loads(outputs[0].read_text())


def column(table, name):
    return {layout: [row[name] for row in rows] for layout, rows in table.items()}


@pytest.mark.soak
def test_the_layouts_are_what_they_are_called(report):
    assert column(report["measured"], "in_channels") == {
        "sequence": [64, 64, 64, 64], "channel": [64, 448, 832, 1216], "released": [64, 448, 448, 448]}
    assert column(report["measured"], "image_tokens") == {
        "sequence": [4, 8, 12, 16], "channel": [4, 4, 4, 4], "released": [4, 4, 8, 12]}


@pytest.mark.soak
def test_every_row_is_measured_and_related_to_no_condition(report):
    assert report["machine"]["platform"] == "cpu" and report["repeats"] == 1
    for rows in report["measured"].values():
        assert [row["conditions"] for row in rows] == [0, 1, 2, 3]
        assert rows[0]["flop_ratio"] == rows[0]["time_ratio"] == 1
        assert all(0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"] for row in rows)


@pytest.mark.soak
def test_the_12b_ratios(report):
    ratios = column(report["closed_form_12b"]["4096"], "flop_ratio")
    assert ratios["sequence"] == pytest.approx([1, 2.22, 3.76, 5.62], abs=0.005)
    assert ratios["released"] == pytest.approx([1, 1.00, 2.22, 3.77], abs=0.005)
    assert ratios["channel"] == pytest.approx([1, 1, 1, 1], abs=5e-4)
    assert column(report["closed_form_12b"]["1024"], "flop_ratio")["sequence"] == pytest.approx(
        [1, 1.75, 2.57, 3.46], abs=0.005)


@pytest.mark.soak
def test_the_plot_and_the_caveat(outputs, report):
    assert outputs[1].read_bytes().startswith(b"\x89PNG")
    assert "References still cost tokens" in report["caveat"]


@pytest.mark.parametrize("flags, message", [
    (["nosuch"], "unknown benchmark 'nosuch'; known: concat"),
    (["concat", "--tokens", "10"], "--tokens is 10; it must be a square up to 4096"),
    (["concat", "--tokens", "16384"], "--tokens is 16384"),
    (["concat", "--text", "0"], "--text is 0"),
    (["concat", "--repeats", "0"], "--repeats is 0"),
    (["concat", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: not a file in an existing folder"),
    (["concat", "--plot", "x.jpeg"], "must end in .png"),
    (["concat", "--cpu", "--model", "12b"], "--model 12b is measured on an accelerator"),
])
def test_mistakes_are_told_before_anything_runs(flags, message):
    with pytest.raises(UserError, match=message):
        bench.main(flags)


def test_an_installed_package_says_that_it_has_no_benchmarks(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match="not part of the installed package"):
        bench.main(["concat", "--cpu"])


@pytest.mark.parametrize("flags, word", [(["--help"], "concat"), (["concat", "--help"], "--repeats")])
def test_help(flags, word, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    assert stop.value.code == 0 and word in capsys.readouterr().out
