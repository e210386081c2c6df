"""SIGTERM: the machine is wanted back. All processes of a run agree on the step after which they save and leave."""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start it again, it goes on


class Preempted(SystemExit):
    """The run was asked to leave, and has saved `step`; a process that lets it pass exits with EXIT_CODE."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step


class Preemption:
    """While entered, SIGTERM ends the run after a step instead of at once.

    With several processes jax's coordination service listens, from `jax.distributed.initialize` on: a signal to any
    of them reaches all, and the step is one that none has begun.
    """

    def __enter__(self) -> "Preemption":
        self._noticed = False
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save this step and leave. Every process asks after each of its steps, once."""
        if jax.process_count() == 1:
            return self._noticed
        return multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, *_) -> None:
        self._noticed = True
