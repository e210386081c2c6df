"""A bucket in memory: what `gs://` paths meet in the cloud, without one."""

import io

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """fsspec's memory, under the name that etils asks for when it meets gs://."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            return super()._open(path, mode.replace("a", "w"), **kwargs)  # as gcsfs: a bucket appends nothing
        if self._strip_protocol(path) not in self.store:  # a bucket has no folders to open
            raise FileNotFoundError(path)
        return io.BytesIO(self.store[self._strip_protocol(path)].getvalue())  # fsspec's own is one for all readers


@pytest.fixture
def bucket():
    """`gs://pictures`, empty."""
    def renew():
        backend.fsspec_backend._get_filesystem.cache_clear()
        Bucket.store.clear()
        Bucket.pseudo_dirs[:] = [""]
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    renew()
    path = epath.Path("gs://pictures")
    path.mkdir()
    yield path
    renew()
