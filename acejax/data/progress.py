"""How far long work is: how long it will take, once that can be told; then a bar on a terminal, a line from time to
time in a log.
"""

import sys
import time
from typing import Any

from tqdm import tqdm

from acejax.parallel.processes import is_first

EVERY = 30.0  # seconds between lines in a log
MEASURED = 5.0  # seconds of steady work that tell how long all will take


class Progress:
    """`with Progress(total, "pairs: pictures", "tiles") as progress: progress.update()`."""

    def __init__(self, total: int, label: str, unit: str):
        self._label, self._unit, self._total, terminal = label, unit, total, sys.stderr.isatty()
        self._lines = not terminal and is_first()
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}", disable=not (terminal and is_first()), delay=1)
        self._done, self._started, self._said = 0, time.time(), time.time()
        self._first: tuple[int, float] | None = None  # done, and when, as steady work began
        self._told = not is_first()

    def update(self, count: int = 1) -> None:
        self._bar.update(count)
        self._done += count
        if self._lines and (now := time.time()) - self._said >= EVERY:
            self._said, rate = now, self._done / (now - self._started)
            left = (self._total - self._done) / rate
            print(f"{self._label}: {self._done:,} of {self._total:,} {self._unit}, "
                  f"{format(rate, ',.1f' if rate >= 1 else '.2g')} a second, {left:,.0f} seconds left", flush=True)

    def say(self, what: str) -> None:
        """What is being done: beside the bar, or as a line from time to time."""
        self._bar.set_description(f"{self._label}: {what}")
        if self._lines and (now := time.time()) - self._said >= EVERY:
            self._said = now
            print(f"{self._label}: {what}, {self._done:,} of {self._total:,} {self._unit} done", flush=True)

    def steady(self) -> None:
        """To be called from time to time, first when all is done that is slow but once, such as compiling."""
        now = time.time()
        if self._first is None:
            self._first = self._done, now
        done, spent = self._done - self._first[0], now - self._first[1]
        if self._told or done < 1 or spent < MEASURED:
            return
        self._told, left = True, self._total - self._done
        minutes = max(1, round(left * spent / done / 60))
        tqdm.write(f"{self._label}: about {minutes:,} minute{'s' * (minutes > 1)} for {left:,} more {self._unit}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
