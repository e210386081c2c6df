"""Steps that were skipped because their loss or gradient was not finite: too many of them stop a run."""

from collections.abc import Sequence

import numpy as np

from acejax.errors import UserError
from acejax.train.metrics import Metrics


class BadSteps:
    """Counts skipped steps from metrics that are fetched anyway, an interval at a time.

    Args:
      limit: so many, over the whole run, are let pass.
      tasks: their names.
      count: how many there were before (`TrainState.skipped` of a resumed run).
    """

    def __init__(self, limit: int, tasks: Sequence[str], count: int = 0):
        self._limit, self._tasks, self._count, self._first = limit, tasks, count, ""

    def look(self, steps: Sequence[Metrics], done: int) -> None:
        """See an interval's metrics, the last one's after step `done`.

        Raises:
          UserError: there were more than the limit; the message tells the first that was seen.
        """
        for place, step in enumerate(steps):
            if step["skipped"]:
                self._count += 1
                self._first = self._first or self._tell(step, done - len(steps) + place + 1)
        if self._count > self._limit and self._first:
            raise UserError(f"training has stopped at step {done}: {self._count} steps were skipped, as their loss "
                            f"or gradient was not finite; config.watch.bad_steps lets {self._limit} pass. "
                            f"{self._first}; the last checkpoint has nothing of them")

    def _tell(self, step: Metrics, number: int) -> str:
        share = np.asarray(step["task_fraction"])
        tasks = [name for name, part in zip(self._tasks, share, strict=True) if part != 0]  # NaN is
        return (f"The first one seen was step {number}: loss {float(step['loss']):.4g}, gradient norm "
                f"{float(step['gradient_norm']):.4g}, tasks in its batch: {', '.join(tasks)}")
