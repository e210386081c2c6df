"""A look inside a run: a profiler's trace of some steps, and what XLA made of each compiled step."""

import pathlib
import tempfile
from typing import Any

import jax
from etils import epath

from acejax.data import written
from acejax.errors import UserError
from acejax.parallel.processes import say


class Profiler:
    """Traces the steps from `start` to before `stop` (numbered as in the metrics: the first step of a run is 0 here and
    logged as 1) into `<workdir>/profile`, which TensorBoard and XProf open; `perfetto_trace.json.gz` in it is for
    https://ui.perfetto.dev. Every process traces its own devices.

    A run that goes on inside of the window traces what is left of it, one that goes on after it nothing.

    Args:
      workdir: of the run.
      window: START:STOP as text; "" traces nothing.
      first: the step that the run starts or goes on at.

    Raises:
      UserError: a window that is none.
    """

    def __init__(self, workdir: epath.PathLike, window: str = "", first: int = 0):
        self._start, self._stop = window_of(window)
        self._into = epath.Path(workdir) / "profile"
        self._folder: tempfile.TemporaryDirectory | None = None
        if self._stop and first >= self._stop:
            say(f"--profile={window}: the run goes on at step {first}, nothing is left to profile")

    def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """A context for one step's dispatch: starts the trace where it is time, and names the step in it."""
        if self._folder is None and self._start <= step < self._stop:
            self._folder = tempfile.TemporaryDirectory()  # jax writes no gs://
            jax.profiler.start_trace(self._folder.name, create_perfetto_trace=True)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, done: int, result: Any) -> None:
        """Call with the number of steps done and something that the last of them made: ends the trace with the window,
        once the devices have."""
        if self._folder is not None and done >= self._stop:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that a run's own end cuts short."""
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        root = pathlib.Path(self._folder.name)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                place = self._into / path.relative_to(root).as_posix()
                place.parent.mkdir(parents=True, exist_ok=True)
                written.write(place, path.read_bytes())
        self._folder.cleanup()
        self._folder = None
        say(f"profile: {self._into}")


def window_of(text: str) -> tuple[int, int]:
    """START:STOP -> its two steps; (0, 0) of nothing.

    Raises:
      UserError: anything else.
    """
    start, colon, stop = text.partition(":")
    if not text:
        return 0, 0
    if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f"--profile={text}: expected START:STOP, two step numbers, the second one greater")
    return int(start), int(stop)


def write_hlo(folder: epath.PathLike, name: str, compiled: jax.stages.Compiled) -> None:
    """Write `<folder>/<name>.hlo.txt`, a compiled step after XLA's passes, and `<name>.memory.txt`, what it asks of a
    device. Process 0 writes; all have the same.

    Raises:
      UserError: the folder can't be written.
    """
    if jax.process_index():
        return
    folder = epath.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dump_hlo={folder}: {error}") from error
    written.write(folder / f"{name}.hlo.txt", compiled.as_text().encode())
    written.write(folder / f"{name}.memory.txt", f"{compiled.memory_analysis()}\n".encode())
