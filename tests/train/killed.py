"""The small run in a process of its own, to be killed: `Run(workdir, ...)` starts one.

Processes are forked from one that has imported everything and has not started jax.
"""

import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import threading
import time

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # each process compiles the same small programs
from absl import logging  # noqa: E402

from acejax.checkpoint import Checkpoints  # noqa: E402
from acejax.data.schedule import Stage  # noqa: E402
from acejax.data.stream import Batch, Stream  # noqa: E402
from acejax.errors import UserError  # noqa: E402
from acejax.train.loop import train  # noqa: E402
from acejax.workdir import lock  # noqa: E402
from tests.train.small import Table, make_config  # noqa: E402

STEPS = 60
EVERY = 10  # steps between saves
SIZES = ((12, 8),)


class Run:
    """A process that trains.

    Args:
      workdir: of the run; what it prints goes to `<workdir>.log`.
      fsdp: of the two devices.
      until: the step to stop after.
      fault: "disk": there is room for the first save only. "nan": the batch of step 7 has one. "save 20": the process
        kills itself while it saves step 20.
    """

    def __init__(self, workdir: pathlib.Path, fsdp: int = 2, until: int | None = None, fault: str = ""):
        self.log = workdir.with_name(f"{workdir.name}.log")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.process = context.Process(target=_main, args=(workdir, self.log, fsdp, until, fault))
        self.process.start()

    def end(self) -> int:
        """The exit code, or minus the signal that it died from."""
        self.process.join(300)
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait_for(self, text: str) -> None:
        """Until it has printed this, or ended."""
        while self.process.is_alive() and not (self.log.exists() and text in self.log.read_text()):
            time.sleep(0.02)


class Poisoned(Stream):
    """A NaN in the target of step 7."""

    def __getitem__(self, step: int) -> Batch:
        batch = super().__getitem__(step)
        if step == 6:
            batch.arrays["target"][0, 0, 0] = float("nan")
        return batch


class Filling(Checkpoints):
    """The disk is full after the first save."""

    def save(self, step: int, *args, **kwargs) -> None:
        if step > EVERY:
            self._manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        super().save(step, *args, **kwargs)


def _main(workdir: pathlib.Path, log: pathlib.Path, fsdp: int, until: int | None, fault: str) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.set_verbosity(logging.FATAL)
    kind, _, step = fault.partition(" ")
    if kind == "save":
        threading.Thread(target=_die_inside, args=(workdir / "checkpoints", step), daemon=True).start()
    if kind == "disk":
        train.__globals__["Checkpoints"] = Filling
    config = make_config(SIZES)
    config.update({"steps": STEPS, "checkpoint": {"every": EVERY}, "mesh": {"data": -1, "fsdp": fsdp}})
    stages = [Stage(STEPS // 2, {"a": 1, "b": 1}, 0), Stage(STEPS // 2, {"a": 1, "b": 1, "r": 1, "s": 1})]
    stream = (Poisoned if kind == "nan" else Stream)(Table(), stages, [12], dict(SIZES), seed=3)
    try:
        with lock(workdir):
            train(config, workdir, stream, until)
    except UserError as error:
        print(f"acejax: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _die_inside(folder: pathlib.Path, step: str) -> None:
    """kill -9 as soon as the step's unfinished folder is there and has something in it."""
    while True:
        if any((folder / f"{step}.orbax-checkpoint-tmp").glob("*/*")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0005)
