"""Broken weight files from whole ones: each mutation is drawn from a seed and says what must become of it."""

import json
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np

REFUSED, ANY, NOT_FINITE = "refused", "any", "not finite"  # a message; a message or a report; a report of NaN
# but float16: it has bfloat16's size, and nobody can tell
DTYPES = ("F64", "F32", "BF16", "F8_E4M3", "I64", "I8", "U8", "BOOL", "F6", "", None, 5, [], {})


class File:
    """A safetensors file taken apart."""

    def __init__(self, whole: bytes):
        (length,) = struct.unpack("<Q", whole[:8])
        self.header = json.loads(whole[8:8 + length])
        self.metadata = self.header.pop("__metadata__", {})
        self.data = bytearray(whole[8 + length:])

    def pack(self, text: bytes | None = None) -> bytes:
        text = json.dumps({"__metadata__": self.metadata, **self.header}).encode() if text is None else text
        return struct.pack("<Q", len(text)) + text + bytes(self.data)

    def pick(self, rng: np.random.Generator) -> str:
        return list(self.header)[rng.integers(len(self.header))]


def truncated(whole: bytes, rng: np.random.Generator) -> bytes:
    return whole[:rng.integers(len(whole))]


def longer(whole: bytes, rng: np.random.Generator) -> bytes:
    return whole + rng.bytes(int(rng.integers(1, 64)))


def header_length(whole: bytes, rng: np.random.Generator) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    other = int(rng.choice([0, 1, length - 1, length + 1, len(whole), 10**8, 10**9, 2**63]))
    return struct.pack("<Q", other) + whole[8:]


def header_bytes(whole: bytes, rng: np.random.Generator) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    changed = bytearray(whole)
    for at in rng.integers(8, 8 + length, rng.integers(1, 4)):
        changed[at] = rng.integers(256)
    return bytes(changed)


def offsets(whole: bytes, rng: np.random.Generator) -> bytes:
    file = File(whole)
    entry = file.header[file.pick(rng)]
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = [[start + 2, stop + 2], [start, stop + 2], [stop, start - 1], [-start - 1, stop],
                             [start, 2**62], [start + 0.5, stop], ["0", stop], [start]][rng.integers(8)]
    return file.pack()


def swapped(whole: bytes, rng: np.random.Generator) -> bytes:
    """Two tensors at one place."""
    file = File(whole)
    key = file.pick(rng)
    entry = file.header[key]
    twins = [other for other, found in file.header.items() if other != key and found["shape"] == entry["shape"]]
    if not twins:
        return whole[:-1]
    file.header[twins[0]]["data_offsets"] = entry["data_offsets"]
    return file.pack()


def dtype(whole: bytes, rng: np.random.Generator) -> bytes:
    file = File(whole)
    entry = file.header[file.pick(rng)]
    others = [name for name in DTYPES if name != entry["dtype"]]
    entry["dtype"] = others[rng.integers(len(others))]
    return file.pack()


def shape(whole: bytes, rng: np.random.Generator) -> bytes:
    """Another shape of the same size: only a table can tell."""
    file = File(whole)
    matrices = [key for key, entry in file.header.items() if len(set(entry["shape"])) > 1]
    entry = file.header[matrices[rng.integers(len(matrices))]]
    entry["shape"] = [entry["shape"][::-1], [1, *entry["shape"]], [int(np.prod(entry["shape"]))]][rng.integers(3)]
    return file.pack()


def wild_shape(whole: bytes, rng: np.random.Generator) -> bytes:
    file = File(whole)
    file.header[file.pick(rng)]["shape"] = [[2**40, 2**40], [-4, 4], [1.5], "64", None, [0], [True],
                                             [0, 2**61, 2**61], [1] * 70, [2**61] * 300][rng.integers(10)]
    return file.pack()


def missing(whole: bytes, rng: np.random.Generator) -> bytes:
    file = File(whole)
    key = file.pick(rng)
    start, stop = file.header.pop(key)["data_offsets"]
    del file.data[start:stop]
    for entry in file.header.values():
        if entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [at - (stop - start) for at in entry["data_offsets"]]
    return file.pack()


def renamed(whole: bytes, rng: np.random.Generator) -> bytes:
    file = File(whole)
    key = file.pick(rng)
    file.header[str(rng.choice([key + "x", key[1:], "", key.upper(), key + ".lora_A.weight", "\u202e" + key]))] = (
        file.header.pop(key))
    return file.pack()


def duplicated(whole: bytes, rng: np.random.Generator) -> bytes:
    file = File(whole)
    key = file.pick(rng)
    text = json.dumps(file.header)
    return file.pack(f'{text[:-1]}, {json.dumps(key)}: {json.dumps(file.header[key])}}}'.encode())


def other_json(whole: bytes, rng: np.random.Generator) -> bytes:
    texts = ["[]", "3", "null", "{", '{"a": 1}', '{"a": {}}', '{"__metadata__": 3}', "[" * 100_000, "", '"x"']
    return File(whole).pack(texts[rng.integers(len(texts))].encode())


def other_format(whole: bytes, rng: np.random.Generator) -> bytes:
    return [b"GGUF" + whole[4:], b"PK\3\4" + whole[4:], b"\x80\x04cposix\nsystem\n(S'touch executed'\ntR.", b"",
            rng.bytes(1000), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n"][
                rng.integers(6)]


def data(whole: bytes, rng: np.random.Generator) -> bytes:
    """Other numbers: a model like any other, or one with NaN."""
    file = File(whole)
    at = rng.integers(len(file.data) - 16)
    file.data[at:at + 16] = rng.bytes(16)
    return file.pack()


def not_finite(whole: bytes, rng: np.random.Generator) -> bytes:
    file = File(whole)
    entry = file.header[file.pick(rng)]
    start, stop = entry["data_offsets"]
    value = rng.choice([np.nan, np.inf, -np.inf])
    bad = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}[entry["dtype"]](value).tobytes()
    at = start + len(bad) * int(rng.integers((stop - start) // len(bad)))
    file.data[at:at + len(bad)] = bad
    return file.pack()


Mutation = Callable[[bytes, np.random.Generator], bytes]
MUTATIONS: dict[Mutation, str] = {
    truncated: REFUSED, longer: REFUSED, header_length: REFUSED, header_bytes: ANY, offsets: REFUSED, swapped: REFUSED,
    dtype: REFUSED, shape: REFUSED, wild_shape: REFUSED, missing: REFUSED, renamed: REFUSED, duplicated: REFUSED,
    other_json: REFUSED, other_format: REFUSED, data: ANY, not_finite: NOT_FINITE}
