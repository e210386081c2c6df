"""Whatever holds the samples, they come out the same, and every source opens again in another process."""

import dataclasses
import pickle

import pytest

from acejax import UserError
from acejax.data import shards
from acejax.data.build import build
from acejax.data.sources import open_source
from tests.data import drawn

ROWS = list(drawn.samples(6))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same samples as JSONL, ACE's text, a folder and a TFDS dataset."""
    root = tmp_path_factory.mktemp("sources")
    jsonl = drawn.write(root / "p", ROWS)
    text, folder = root / "p" / "pairs.csv", root / "pictures"
    lines = []
    for number, row in enumerate(ROWS):
        named = [f"{number}.{field}" if getattr(row, field) else "" for field in ("image", "mask", "target")]
        references = [f"{number}.reference{place}" for place in range(len(row.references))]
        lines.append("#;#".join([*named, *references, *[""] * (2 - len(references)), row.prompt, row.task]))
        (folder / row.task).mkdir(parents=True, exist_ok=True)
        files = {".jpg": row.target, ".edit.jpg": row.image, ".mask.png": row.mask, ".txt": row.prompt.encode()} | {
            f".ref{place}.jpg": data for place, data in enumerate(row.references, 1)}
        for suffix, data in files.items():
            if data is not None:
                (folder / row.task / f"{number}{suffix}").write_bytes(data)
    text.write_text("\n".join(lines))
    return {"jsonl": jsonl, "text": text, "folder": folder, "tfds": build(root / "tfds", {"train": ROWS})}


FIELDS = {"text": "edit_image,edit_mask,target_image,ref_image,ref_image,prompt,data_type"}


def plain(rows):
    rows = [dataclasses.replace(row, name="", detail="") for row in rows]
    return sorted(rows, key=lambda row: row.prompt)


@pytest.mark.parametrize("kind", ["jsonl", "text", "folder", "tfds"])
def test_the_same_samples_from_everywhere(places, kind):
    source = open_source(places[kind], fields=FIELDS.get(kind))
    assert plain(source) == plain(ROWS)
    assert all(row.name for row in source)
    again = pickle.loads(pickle.dumps(source))
    assert list(again) == list(source) and len(pickle.dumps(source)) < 1000


def first_of(source, answer):
    answer.put(source[0])


def test_a_source_opens_again_in_another_process(places):
    context = shards._context()
    for kind in ("jsonl", "tfds"):
        source, answer = open_source(places[kind]), context.Queue()
        run = context.Process(target=first_of, args=(source, answer))
        run.start()
        assert answer.get(timeout=60) == source[0]
        run.join()


def test_a_data_dir_is_a_dataset_too_and_parts_of_it(places):
    assert len(open_source(places["tfds"].parents[1], "train[:50%]")) == 3


@pytest.mark.parametrize("kind, more, message", [
    (None, {}, "no such file or folder; expected a manifest, a folder of pictures or a TFDS dataset"),
    ("jsonl", {"split": "train[:5]"}, r"a manifest has no parts such as 'train\[:5\]'"),
    ("jsonl", {"fields": {"prompt": "caption"}}, "a manifest; expected fields as an order"),
    ("tfds", {"fields": "prompt,target_image"}, "a TFDS dataset; expected no prefix, and fields as names"),
    ("tfds", {"prefix": "/x"}, "a TFDS dataset; expected no prefix"),
    ("tfds", {"split": "test"}, "no split 'test'; it has train"),
])
def test_mistakes_are_named(places, tmp_path, kind, more, message):
    with pytest.raises(UserError, match=message):
        open_source(places[kind] if kind else tmp_path / "nothing", **more)


def test_a_folder_with_nothing_and_an_unfinished_dataset(tmp_path):
    with pytest.raises(UserError):
        open_source(tmp_path)
    with pytest.raises(UserError, match="picture"):
        build(tmp_path, {"train": [dataclasses.replace(ROWS[0], target=b"none")]})
    for place in (tmp_path, tmp_path / "condition_units" / "1.0.0"):
        with pytest.raises(UserError, match="a dataset whose build did not end"):
            open_source(place)
