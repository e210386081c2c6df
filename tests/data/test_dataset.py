import subprocess
import sys

import numpy as np
import pytest

from acejax import UserError
from acejax.data import dataset, tabulate
from acejax.demo.surroundings import encode_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)

    def records():
        for number in range(6):
            picture = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            mask = (picture[..., 0] > 127).astype(np.uint8) * 255
            yield dataset.record("insert", "a red heart", picture, picture, mask, [picture] * (number % 2), "détail")
    return dataset.build(tmp_path_factory.mktemp("data"), {"train": records})


def test_pictures_come_back_as_they_went(folder):
    rows = dataset.read(folder, "train")
    assert len(rows) == 6 and sorted(len(row["references"]) for row in rows) == [0, 0, 0, 1, 1, 1]
    for row in rows:
        np.testing.assert_array_equal(row["image"], row["target"])
        np.testing.assert_array_equal(row["mask"], (row["target"][..., 0] > 127) * 255)
        assert row["detail"] == "détail" and row["prompt"] == "a red heart"


def test_absent_pictures_are_none(tmp_path):
    target = np.zeros((16, 16, 3), np.uint8)
    built = dataset.build(tmp_path, {"train": lambda: [dataset.record("text", "a star", target)]})
    (row,) = dataset.read(built, "train")
    assert row["image"] is None and row["mask"] is None and row["references"] == ()


def test_tabulate_encodes_each_canvas_once(folder):
    rows = [row for row in dataset.read(folder, "train") if not row["references"]]
    calls = []

    def encode_pictures(pictures):
        calls.append(len(pictures))
        return pictures.reshape(len(pictures), 4, 8, 4, 8, 3).mean((2, 4)).repeat(6, -1)[..., :16]

    table = tabulate.tabulate(rows, {}, encode_pictures, encode_prompts)["insert"]
    assert calls == [3, 3, 3], "edit, modify and target, each once"
    assert table["target"].shape == (3, 4, 4, 16) and table["mask"].shape == (3, 32, 32, 1)
    assert set(np.unique(table["mask"])) == {0, 1} and table["unit"].tolist() == [[-1, -1]] * 3


def test_reading_needs_no_tensorflow(folder):
    script = f"""
import sys
from acejax.data import dataset
assert len(dataset.read({str(folder)!r}, "train")[0]["prompt"])
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_dataset_or_split_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="no TFDS dataset can be read there"):
        dataset.read(tmp_path / "nothing", "train")
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        dataset.read(folder, "test")
