"""TFDS datasets: what is written is what comes back, byte for byte, and foreign ones are read or named."""

import dataclasses
import importlib.util
import io
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from acejax import UserError
from acejax.data import dataset, pictures
from acejax.data.build import build
from tests.data.drawn import samples

ROWS = list(samples(9))


def nameless(rows):
    return [dataclasses.replace(row, name="") for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data"), {"train": ROWS, "test": ROWS[:2]}, shards=2)


def test_bytes_come_back_as_they_went(folder):
    rows = dataset.read(folder, "train")
    assert nameless(rows) == nameless(ROWS)
    assert [row.name for row in rows] == [f"{folder}/train[{number}]" for number in range(9)]
    assert {len(row.references) for row in rows} == {0, 1, 2} and {row.image is None for row in rows} == {True, False}
    assert rows[-1] == rows[8]
    with pytest.raises(IndexError):
        _ = rows[9]


def test_tfds_itself_reads_and_decodes_it(folder):
    builder = tfds.builder_from_directory(str(folder))
    source = builder.as_data_source("train")
    assert builder.info.splits["train"].num_examples == len(source) == 9
    assert builder.info.splits["train"].num_bytes == sum(
        file.stat().length for file in folder.glob("*-train.array_record*"))
    for row, sample in zip(source, ROWS, strict=True):
        assert row["prompt"].decode() == sample.prompt and len(row["image"]) == (sample.image is not None)
        np.testing.assert_array_equal(row["target"], np.asarray(Image.open(io.BytesIO(sample.target))))
        assert [part.shape for part in row["references"]] == [
            (*pictures.size(data, ""), 3) for data in sample.references]
        assert all(part.shape[-1] == 1 for part in row["mask"])


def test_slices_and_sums_of_splits(folder):
    assert nameless(dataset.read(folder, "train[2:5]")) == nameless(ROWS[2:5])
    assert len(dataset.read(folder, "train+test")) == 11


def test_a_source_pickles_as_its_name(folder):
    rows = dataset.read(folder, "train")
    text = pickle.dumps(rows)
    assert len(text) < 300 + len(str(folder)) and pickle.loads(text)[5] == rows[5]


def test_a_folder_with_one_dataset_below_is_enough(folder):
    assert len(dataset.read(folder.parents[1], "test")) == 2


def test_tensorflow_is_not_there(folder):
    assert importlib.util.find_spec("tensorflow") is None
    list(tfds.builder_from_directory(str(folder)).as_data_source("train"))
    assert "tensorflow" not in sys.modules


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="nothing: no TFDS dataset can be read there: no such folder"):
        dataset.read(tmp_path / "nothing", "train")
    with pytest.raises(UserError, match="found no dataset_info.json in it"):
        dataset.read(tmp_path, "train")
    with pytest.raises(UserError, match="no split 'held'; it has test, train"):
        dataset.read(folder, "held")
    with pytest.raises(UserError, match="split 'train.x:.'"):
        dataset.read(folder, "train[x:]")
    (tmp_path / "half").mkdir()
    for file in folder.iterdir():
        if "train.array_record-00001" not in file.name:
            (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    assert len(dataset.read(tmp_path / "half", "test")) == 2
    with pytest.raises(UserError, match="1 of 2 files are missing, condition_units-train.array_record-00001-of-00002"):
        dataset.read(tmp_path / "half", "train")
    (tmp_path / "half" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="half: no TFDS dataset can be read there"):
        dataset.read(tmp_path / "half", "train")


def test_a_damaged_file_is_named(tmp_path):
    built = build(tmp_path, {"train": ROWS})
    (file,) = built.glob("*-train.array_record*")
    data = bytearray(file.read_bytes())
    data[2000:6000] = bytes(4000)
    file.write_bytes(data)
    rows = dataset.read(built, "train")
    with pytest.raises(UserError, match=r"train\[\d\]: cannot be read"):
        list(rows)


def foreign(folder, features, examples, name="others"):
    """A dataset as another program writes it."""
    features = tfds.features.FeaturesDict(features)
    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
    for example in examples:
        writer.write(features.serialize_example(example))
    writer.close()
    info = tfds.core.SplitInfo(name="train", shard_lengths=[len(examples)], num_bytes=0)
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[info], check_data=False)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """As InstructPix2Pix has it, with what serves no field."""
    features = {
        "edited": tfds.features.Image(encoding_format="jpeg"), "original": tfds.features.Image(), "id": np.int64,
        "instruction": tfds.features.Text(), "kind": tfds.features.ClassLabel(names=["insert", "recolor"]),
        "texts": tfds.features.Sequence(tfds.features.Text()), "image": tfds.features.Image(),
        "pair": tfds.features.Sequence(tfds.features.Image())}
    row = ROWS[1]
    example = {"edited": row.target, "original": row.image, "image": row.image, "id": 3, "instruction": "röter",
               "kind": "recolor", "texts": ["a"], "pair": [row.target, row.image]}
    return foreign(tmp_path_factory.mktemp("other") / "1.0.0", features, [example])


NAMES = {"target": "edited", "image": "original", "prompt": "instruction"}


def test_other_programs_datasets(other):
    (sample,) = dataset.read(other, "train", NAMES | {"task": "kind", "references": "pair"})
    row = ROWS[1]
    assert (sample.target, sample.image, sample.mask, sample.references) == (
        row.target, row.image, None, (row.target, row.image))
    assert (sample.prompt, sample.task) == ("röter", "recolor")
    (sample,) = pickle.loads(pickle.dumps(dataset.read(other, "train", NAMES | {"image": None})))
    assert sample.image is None and sample.task == "default" and sample.references == ()
    (sample,) = dataset.read(other, "train", {"target": "image", "prompt": "instruction"})
    assert sample.image is None, "a feature named for one field is not taken for another"


@pytest.mark.parametrize("fields, message", [
    ({}, r"no feature for target; expected one of that name, a picture, or fields={'target': NAME}; it has edited \("),
    (NAMES | {"prompt": None}, "no feature for prompt"),
    (NAMES | {"prompt": "caption"}, "no feature 'caption' for prompt; it has"),
    (NAMES | {"prompt": "id"}, "feature 'id' for prompt is .*int64; expected text"),
    (NAMES | {"mask": "instruction"}, "feature 'instruction' for mask is Text; expected a picture"),
    (NAMES | {"references": "texts"}, r"feature 'texts' for references is Sequence\(.*\); expected a picture"),
    (NAMES | {"picture": "image"}, "no field picture; the fields are target, image"),
])
def test_features_that_do_not_serve_are_named(other, fields, message):
    with pytest.raises(UserError, match=message):
        dataset.read(other, "train", fields)


def test_two_pictures_for_one_are_named(other):
    with pytest.raises(UserError, match=r"train\[0\]: 2 pictures in 'pair' for image; expected one"):
        _ = dataset.read(other, "train", NAMES | {"image": "pair"})[0]


def test_another_file_format_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name.replace("array_record", "tfrecord")).write_bytes(
            file.read_bytes().replace(b"array_record", b"tfrecord"))
    with pytest.raises(UserError, match="is stored as tfrecord, which has no random access; expected array_record"):
        dataset.read(tmp_path, "train")
