"""The file of a compiled step: whole or not at all, and what is wrong with one is told."""

import pytest

from acejax.errors import UserError
from acejax.train import saved

KEY = {"versions": {"jax": "0.10.2"}, "mesh": {"data": 2}}


@pytest.fixture
def path(tmp_path):
    saved.write(tmp_path / "a.executable", KEY, ("loss", "tar"), b"program")
    return tmp_path / "a.executable"


def test_a_file_is_read_as_it_was_written(path):
    header = saved.read(path)
    assert header.key == KEY and header.metrics == ("loss", "tar") and header.size == 7
    assert saved.payload(path) == b"program"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("change, told", [
    (lambda data: data[:-1], "is damaged: found 6 bytes of a program, expected 7; delete it"),
    (lambda data: data[:-1] + b"x", "is damaged: found a program of sha256 "),
    (lambda data: data[:40], "is damaged: found 12 bytes of a header, expected "),
    (lambda data: data.replace(b'"key"', b'"kee"'), r"is damaged: found a header that is none \(KeyError: 'key'\)"),
    (lambda data: data.replace(b"{", b"(", 1), r"is damaged: found a header that is none \(JSONDecodeError"),
    (lambda data: b"PK" + data, r"is no saved executable: it begins with b'PKacejax.*expected b'acejax executable 1"),
    (lambda data: b"", "is no saved executable: it begins with b''"),
])
def test_a_damaged_file_is_told(path, change, told):
    damage(path, change)
    with pytest.raises(UserError, match=f"a.executable {told}"):
        saved.payload(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none.executable cannot be read: No such file"):
        saved.read(tmp_path / "none.executable")
    with pytest.raises(UserError, match="no/a.executable cannot be written"):
        saved.write(tmp_path / "no" / "a.executable", KEY, (), b"")
