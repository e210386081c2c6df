"""Sources tell without reading their pictures whether anything of them may have changed."""

import json
import os

from acejax.data import build, dataset, manifest
from tests.data.cached import png


def filled(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps({"task": "t", "prompt": f"p{i}", "target": f"{i}.png"}) + "\n"
                                            for i in range(3)))
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i, 16, 16))
    return folder / "a.jsonl"


def test_a_manifest(tmp_path):
    path = filled(tmp_path)

    def identity():
        return manifest.Source(manifest.read(path)).identity()

    found = [identity()]
    assert identity() == found[0]
    os.utime(tmp_path / "1.png", ns=(5, 5))
    found.append(identity())
    (tmp_path / "1.png").write_bytes(b"another")
    os.utime(tmp_path / "1.png", ns=(5, 5))
    found.append(identity())
    (tmp_path / "1.png").unlink()
    found.append(identity())
    path.write_text(path.read_text().replace("p2", "p3"))
    found.append(identity())
    assert len(set(found)) == 5


def test_a_manifest_of_a_bucket_is_read_again(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"task": "t", "prompt": "p", "target": "gs://pictures/a.png"}))
    assert manifest.Source(manifest.read(tmp_path / "a.jsonl")).identity() is None


def test_a_dataset(tmp_path):
    given = manifest.Source(manifest.read(filled(tmp_path)))
    folder = build.build(tmp_path / "data", {"train": given}, name="pets")
    source = dataset.read(folder, "train")
    first = source.identity()
    assert dataset.read(folder, "train").identity() == first
    (file,) = folder.glob("*.array_record*")
    os.utime(file, ns=(5, 5))
    assert source.identity() != first
