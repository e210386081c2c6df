"""One side of one part of `benchmarks.gpu`, in a process of its own: `python -m benchmarks.gpu_side SIDE WORK OUT`.

SIDE is "ours" or "peer", WORK a `Work` as JSON; a row of figures is written to OUT.
"""

import dataclasses
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acejax.model.config import MMDiTConfig

WARM = 3  # steps that no figure counts
RANK = 64
LEVELS = 28  # of the denoiser's schedule


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides do: part, sizes, and how often."""

    part: str
    tiny: bool
    tokens: int
    text: int
    samples: int
    repeats: int
    remat: str
    torch_compile: str

    @property
    def config(self) -> MMDiTConfig:
        return MMDiTConfig.tiny() if self.tiny else MMDiTConfig.ace_plus_fft()


@dataclasses.dataclass(frozen=True)
class Ready:
    """A side that can start.

    Attributes:
      step: does the step of a number to its end, on a synchronised device, and returns an array of what it made; each
        step has other inputs than the one before.
      device: its name; None is no GPU, and then nothing is measured.
      peak: gigabytes that the device held at most.
      facts: what else the row shall say.
      others: further steps to time beside it, by name.
      warmed: is called when the first steps are done, before those that count.
    """

    step: Callable[[int], Any]
    device: str | None
    peak: Callable[[], float]
    facts: dict[str, Any]
    others: dict[str, Callable[[int], Any]] = dataclasses.field(default_factory=dict)
    warmed: Callable[[], None] = lambda: None


def row(ready: Ready, repeats: int) -> dict[str, Any]:
    """Time all steps; the peak is the main one's."""
    first, times, last = timed(ready.step, repeats, ready.warmed)
    measured = {"ms": times, "first_step_s": first, "peak_gb": ready.peak()}
    others = {f"ms_{name}": timed(step, repeats)[1] for name, step in ready.others.items()}
    found = ready.facts | measured | others
    if ready.device is None:
        found |= {name: "not measured" for name in (*measured, *others, "compile_s", "xla_gb") if name in found}
    return found | {"device": ready.device or "no GPU", "finite": math.isfinite(last)}


def timed(step: Callable[[int], Any], repeats: int, warmed: Callable[[], None] = lambda: None
          ) -> tuple[float, list[float], float]:
    """Seconds of the first step, milliseconds of `repeats` after `WARM`, and the sum of what the last one made."""
    times = []
    for number in range(WARM + repeats):
        if number == WARM:
            warmed()
        begin = time.perf_counter()
        last = step(number)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[0] / 1e3, times[WARM:], float(last.sum())


def out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "OutOfMemoryError"


def main(argv: list[str]) -> int:
    side, work, out = argv
    work = Work(**json.loads(work))
    module = importlib.import_module(f"benchmarks.gpu_{side}")
    try:
        found = row(module.PARTS[work.part](work), work.repeats)
    except Exception as error:
        if not out_of_memory(error):
            raise
        found = {"error": f"out of memory: {str(error).splitlines()[0][:300]}"}
    Path(out).write_text(json.dumps(found | {"versions": module.versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
