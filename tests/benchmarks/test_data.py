"""The data benchmark on a few small pictures: what it measures, not how fast that is."""

import importlib.util
import json

import numpy as np
import pytest

from acejax import UserError
from acejax.data import manifest
from acejax.data.canvas import contents
from acejax.data.layout import CanvasConfig
from acejax.data.online import Pictures
from benchmarks import data, data_files

SMALL = ["--files=8", "--samples=12", "--megapixels", "0.02", "0.04", "--seconds=0.01", "--rounds=2"]
TORCH = importlib.util.find_spec("torch") is not None
PEERS = {"torch", "torch bytes", "released"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    read = manifest.read(data_files.generate(tmp_path_factory.mktemp("pictures"), 8, 12, (0.02, 0.04)))
    assert len(read.rows) == 12 and not read.faults
    stream = data.stream_of(Pictures(manifest.Source(read), CanvasConfig()))
    return data.make_work(read, CanvasConfig(), stream, 12), stream


def test_a_run(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert data.main([*SMALL, "--soak=20", f"--json={file}"]) == 0
    figures = json.loads(file.read_text())
    assert figures["columns"].keys() == {"bare", "stream", "floats", "cache"} | (PEERS if TORCH else set())
    assert figures["left_out"].keys() == (set() if TORCH else PEERS)
    for column in figures["columns"].values():
        assert len(column["rounds"]) == 2
        assert column["pictures_per_second"] == pytest.approx(
            column["samples_per_second"] * figures["pictures_a_sample"])
        assert column["cpu_seconds_per_picture"] > 0
    expected = {name for name in data.RATIOS if all(side in figures["columns"] for side in name.split(" / "))}
    assert figures["ratios"].keys() == expected
    assert figures["memory"]["samples"] == 20 and figures["memory"]["end_megabytes"] > 50
    printed = capsys.readouterr().out
    assert "stream / bare" in printed and ("PyTorch is not installed" in printed) == (not TORCH)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_samples_are_as_said(work):
    rows = work[0].rows
    assert work[0].pictures.tolist() == [1 + bool(row.image) + len(row.references) for row in rows]
    assert any(row.references for row in rows) and any(row.image for row in rows)
    assert all(bool(row.image) == bool(row.mask) for row in rows)


@pytest.mark.skipif(not TORCH, reason="PyTorch is not installed")
def test_torch_makes_the_same_canvases(work):
    from benchmarks import data_torch

    floats, whole = (kind(work[0].rows, work[0].layouts) for kind in (data_torch.Antialiased,
                                                                      data_torch.AntialiasedBytes))
    for step in range(12):
        (canvas,) = work[1][step].arrays["canvas"]
        made, seen = floats[step], contents(canvas)
        shown = made["source"].permute(1, 2, 0).numpy() * canvas.present[..., None]
        for one, other in ((made["target"].permute(1, 2, 0).numpy(), seen.target),
                           (shown, 2 / 255 * canvas.source - canvas.present[..., None])):
            assert np.abs(one - other).mean() < 0.01  # Pillow rounds twice, and may halve a JPEG while decoding
        assert np.mean(made["mask"].numpy()[0] * 255 != canvas.mask) < 0.01  # along edges
        assert {name: part.shape for name, part in whole[step].items()} == {
            name: part.shape for name, part in made.items()}
    released = data_torch.Released(work[0].rows, 4096)[0]
    assert released["src"].shape == released["modify"].shape == released["target"].shape


@pytest.mark.parametrize("flags", [["--files=0"], ["--workers=-1"], ["--seconds=0"], ["--folder=nosuch"],
                                   ["--json=no/such/file"], ["--megapixels", "2", "1"]])
def test_what_cannot_be_measured_is_said(flags):
    with pytest.raises(UserError):
        data.main(flags)
