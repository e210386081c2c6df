"""Opening files: every byte of a header accounted for, indices, folders, other formats by name."""

import json
import pathlib
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import acejax
from acejax.weights.source import DTYPES, open_source

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float16),
           "c": np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16), "d": np.array(2.5)}


def refused(path: pathlib.Path, *parts: str) -> None:
    with pytest.raises(acejax.UserError) as error:
        open_source(path)
    for part in (path.name, *parts):
        assert part in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_are_those_of_the_formats_own_library(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path / "x.safetensors")
    assert source.metadata == {"format": "pt"} and source.tensors.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        found = source.tensors[key]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(found[...], tensor)
    np.testing.assert_array_equal(source.tensors["a"][1:, :2], TENSORS["a"][1:, :2])


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "BOOL"])
def test_every_dtype(tmp_path, name):
    values = np.array([0, 1, 3]).astype(DTYPES[name])
    header = {"x": {"dtype": name, "shape": [3], "data_offsets": [0, values.nbytes]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
    np.testing.assert_array_equal(open_source(tmp_path / "x.safetensors").tensors["x"][...], values)


@pytest.fixture
def shards(tmp_path):
    """Two shards and their index."""
    save_file({"a": TENSORS["a"]}, tmp_path / "m-1.safetensors")
    save_file({"c": TENSORS["c"]}, tmp_path / "m-2.safetensors")
    index = tmp_path / "m.safetensors.index.json"

    def write(**weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return index
    write(a="m-1.safetensors", c="m-2.safetensors")
    return write


def test_an_index_or_its_folder(tmp_path, shards):
    (tmp_path / "config.json").write_text('{"x": 1}')
    for path in (tmp_path, tmp_path / "m.safetensors.index.json"):
        source = open_source(path)
        assert source.config == {"x": 1}
        np.testing.assert_array_equal(source.tensors["a"][...], TENSORS["a"])
        np.testing.assert_array_equal(source.tensors["c"][...], TENSORS["c"])


def test_an_index_that_does_not_hold(tmp_path, shards):
    refused(shards(a="m-1.safetensors", c="m-3.safetensors"), "shard 'm-3.safetensors' is not there")
    refused(shards(a="m-2.safetensors", c="m-2.safetensors"), "'a' is missing in 'm-2.safetensors'")
    refused(shards(a="m-1.safetensors", c="m-1.safetensors"), "'c' is missing")
    refused(shards(c="m-1.safetensors"), "'a' stands in 'm-1.safetensors'; the index says None")
    refused(shards(a="../m-1.safetensors"), "files beside the index")
    refused(shards(), "expected a weight_map")
    (tmp_path / "m.safetensors.index.json").write_text("{")
    refused(tmp_path / "m.safetensors.index.json", "expected JSON")


def test_a_folder_with_no_or_two_models(tmp_path):
    refused(tmp_path, "expected one safetensors file or index in this folder; found none")
    for name in "ab":
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "found a.safetensors, b.safetensors")


def test_other_formats_are_named(tmp_path):
    for name, start, told in (("x.gguf", b"GGUF\3\0\0\0", "GGUF"), ("x.pth", b"PK\3\4", "pickle"),
                              ("x.bin", b"\x80\x02}q\0.", "acejax convert"), ("x.safetensors", b"", "cut short")):
        (tmp_path / name).write_bytes(start)
        refused(tmp_path / name, told)


def test_names_out_of_a_file_cannot_speak(tmp_path):
    """Neither lines nor colours nor megabytes of a header's names reach the terminal."""
    for key in ("a\nacejax: all is well\x1b[31m", "\ud800", "x" * 10_000):
        text = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(acejax.UserError) as error:
            open_source(tmp_path / "x.safetensors")
        message = str(error.value).replace(str(tmp_path), "")
        assert message.isascii() and message.isprintable() and len(message) < 400


def test_a_large_header_is_read_in_one_pass(tmp_path):
    """40,000 tensors and a name that comes twice: quadratic time would show."""
    entries = [f'"k{i}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}' for i in range(40_000)]
    text = ("{" + ", ".join([*entries, entries[7]]) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    started = time.process_time()
    refused(tmp_path / "x.safetensors", "names 'k7' twice")
    assert time.process_time() - started < 10  # 150 s when each name was counted


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_system_takes(tmp_path, name):
    with pytest.raises(acejax.UserError, match="no such file"):
        open_source(tmp_path / name)


def test_a_header_that_names_a_tensor_twice(tmp_path):
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = f'{{"twice": {entry}, "twice": {entry}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    refused(tmp_path / "x.safetensors", "names 'twice' twice")
