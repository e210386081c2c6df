"""What docs/data.md shows is true: its manifests are one and the same, and its commands run."""

import pathlib
import re
import shlex

import ml_collections
from PIL import Image

from acejax.cli.main import main
from acejax.data import manifest
from acejax.data.config import SourceConfig

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [content for name, content in found if name == language]


def test_manifests_checks_and_datasets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("pairs.jsonl").write_text(blocks("json")[0])
    text, names = blocks("")[:2]
    pathlib.Path("ace.txt").write_text(text)
    for name in ("star.jpg", "heart.jpg", "grass.jpg", "heart_mask.png", "heart_close.jpg"):
        Image.new("RGB", (80, 64), "white").save(name)
    pathlib.Path("pets/insert").mkdir(parents=True)
    for line in names.splitlines():
        file = pathlib.Path(line.split()[0])
        file.write_text("a cat") if file.suffix == ".txt" else Image.new("RGB", (80, 64), "white").save(file)
    pathlib.Path("train.txt").write_text("star.jpg#;#a star\n")

    lines, ace = manifest.read("pairs.jsonl"), manifest.read("ace.txt")
    assert not lines.faults and lines.rows == ace.rows and len(lines.rows) == 3
    (cat,) = manifest.read("pets").rows
    assert cat.task == "insert" and cat.image and cat.mask and cat.references
    ran = [shlex.split(line, comments=True) for line in "".join(blocks("sh")).splitlines()
           if line.startswith("acejax data check")]
    assert len(ran) >= 7
    for command in ran:
        assert main(command[1:]) == 0, command
    built = [shlex.split(line, comments=True) for line in "".join(blocks("sh")).splitlines()
             if line.startswith("acejax data build")]
    for command in built:
        assert main(command[1:]) == 0, command
    config = ml_collections.ConfigDict({"data": {}})
    exec(blocks("python")[0], {"config": config})
    (source,) = (SourceConfig(**about).open() for about in config.data.sources.values())
    assert len(built) == 3 and len(source) == 3
    assert pathlib.Path("sheet.png").exists() and pathlib.Path("r.json").exists()
    assert "1 sample, " in capsys.readouterr().out
