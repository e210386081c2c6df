"""The processes that build one cache: each does its share, and tells the others through files of the cache's folder."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from acejax.data.cache import store

Told = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Team:
    """One of `count` processes; `barrier(name)` returns when all have called it."""

    index: int = 0
    count: int = 1
    barrier: Callable[[str], None] = lambda name: None

    @classmethod
    def of_jax(cls) -> "Team":
        """The processes of jax; starts no backend where there is one alone."""
        if not jax.distributed.is_initialized():
            return cls()
        from jax.experimental.multihost_utils import sync_global_devices

        return cls(jax.process_index(), jax.process_count(), sync_global_devices)

    def gather(self, folder: epath.PathLike, name: str, arrays: Mapping[str, np.ndarray],
               metadata: Mapping[str, Any]) -> list[Told]:
        """What each process tells, in their order."""
        if self.count == 1:
            return [(arrays, metadata)]
        paths = [epath.Path(folder) / "told" / f"{name}.{i}.safetensors" for i in range(self.count)]
        store.write(paths[self.index], arrays, metadata)
        self.barrier(f"{name} told")
        heard = [store.read(path) for path in paths]
        self.barrier(f"{name} heard")
        paths[self.index].unlink()  # what is mapped stays readable
        return heard
