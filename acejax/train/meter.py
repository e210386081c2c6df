"""How fast a run is and what memory it takes."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from acejax.model import flops
from acejax.model.config import MMDiTConfig
from acejax.parallel.chips import chip_of


class Meter:
    """Counts the steps of an interval; `aside` leaves out what is no training.

    Args:
      config: the model.
      devices: how many train, over all processes.
      peak: FLOP/s of a device; None gives no MFU.
      pairs: of the LoRA that is trained (`acejax.model.flops.low_rank`), where it is one.
    """

    def __init__(self, config: MMDiTConfig, devices: int, peak: float | None, pairs: Mapping[str, int] | None = None):
        self._config, self._devices, self._peak, self._pairs = config, devices, peak, pairs
        self.seconds = 0.0  # of training, up to the last `read`
        self._begin()

    @classmethod
    def of(cls, config: MMDiTConfig, pairs: Mapping[str, int] | None = None) -> "Meter":
        """For all devices there are."""
        chip = chip_of(jax.devices()[0])
        return cls(config, jax.device_count(), None if chip is None else chip.flops, pairs)

    def add(self, rows: int, text: int, bucket: int, lengths: np.ndarray) -> None:
        """A step of `rows` samples, over all processes, of `text` and `bucket` tokens; `lengths` are the image tokens
        of this process's rows, which stand for all."""
        self._steps += 1
        self._computed += rows * (text + bucket)
        self._real += rows * (text + float(np.mean(lengths)))
        self._flops += flops.training_step(self._config, text, bucket, rows, self._pairs)

    @contextlib.contextmanager
    def aside(self, running: Any) -> Iterator[None]:
        """Time that does not count: validation, saves. It starts when `running`, made by the last step, is there."""
        jax.block_until_ready(running)
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """The interval up to now, whose steps must be done; the next one begins."""
        spent = time.perf_counter() - self._started
        self.seconds += spent
        values = {"steps_per_second": self._steps / spent,
                  "tokens_per_second_per_device": self._real / spent / self._devices,
                  "padding": 1 - self._real / self._computed}
        if self._peak is not None:
            values["mfu"] = self._flops / (spent * self._devices * self._peak)
        self._begin()
        return values

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._steps, self._computed, self._real, self._flops = 0, 0, 0.0, 0


def memory() -> dict[str, float]:
    """`device_memory_gb`, the peak of this host's fullest device, or `host_memory_gb`, the peak of this process."""
    found = [stats["peak_bytes_in_use"] for device in jax.local_devices()
             if "peak_bytes_in_use" in (stats := device.memory_stats() or {})]
    if found:
        return {"device_memory_gb": max(found) / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
