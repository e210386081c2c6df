"""The processes of a run: how they find each other, and how they end together.

On a TPU pod, under `srun` and under `mpirun` jax finds the others by itself; elsewhere flags say where the first is. A
process started alone asks for nobody: not on one TPU VM, in a shell of `salloc`, or in a Kubernetes pod, where jax
would look for others.

jax aborts the whole run when a process is gone, after a while, with a stack trace of C++. So each process shows signs
of life of its own, in the store that jax's coordination service keeps, and leaves with one line and the code `LOST`
when another one has failed or is silent. Only the death of the first, which holds that store, is told by jax alone.
"""

import contextlib
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its client keeps the store; Orbax reaches for it in the same way
from jax.experimental import multihost_utils

from acejax.errors import UserError

LOST = 69  # exit code of a process that misses another one: EX_UNAVAILABLE of sysexits.h
PERIOD = 1.0  # seconds between signs of life
GRACE = 5.0  # seconds in which processes that fail alike may do so by themselves


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what one must; starts no backend."""
    return distributed.global_state.process_id == 0


def say(text: str) -> None:
    """Print a line, in the first process."""
    if is_first():
        print(text, flush=True)


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """The first process goes ahead; the others enter when it is through, and find what it has made."""
    if not is_first():
        multihost_utils.sync_global_devices(name)
    yield
    if is_first():
        multihost_utils.sync_global_devices(name)


def launched(environment: Mapping[str, str], tpu: bool) -> dict[str, Any]:
    """What `jax.distributed.initialize` is to be told where a launcher has started several processes; else nothing.

    Args:
      environment: variables, once jax is imported (it marks hosts without TPU chips).
      tpu: whether TPUs could be used at all.
    """
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {"cluster_detection_method": "ompi"}
    if (tasks := int(environment.get("SLURM_STEP_NUM_TASKS", 1))) > 1:  # of this srun; SLURM_NTASKS is the whole job's
        found = {"cluster_detection_method": "slurm", "num_processes": tasks}
        alone = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        if alone and "SLURM_GPUS_ON_NODE" in environment:  # jax would give a process one GPU
            found["local_device_ids"] = list(range(int(environment["SLURM_GPUS_ON_NODE"])))
        return found
    if tpu and (hosts := environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))):
        several = "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1
        return {"cluster_detection_method": "gketpu"} if several else {}
    if tpu and "TPU_SKIP_MDS_QUERY" not in environment:  # a Cloud TPU VM: its metadata name the hosts, be it one
        return {"cluster_detection_method": "gcetpu"}
    return {}


def given(coordinator: str | None, processes: int | None, process: int | None) -> dict[str, Any]:
    """As `launched`, of the flags --coordinator, --processes and --process.

    Raises:
      UserError: some of them without the others, or values that can't be.
    """
    if coordinator is None and processes is None and process is None:
        return {}
    if coordinator is None or processes is None or process is None:
        raise UserError("--coordinator=HOST:PORT, --processes=N and --process=I go together; one is missing")
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 <= process < processes:
        raise UserError(f"--coordinator={coordinator} --processes={processes} --process={process}; expected HOST:PORT "
                        "and a process from 0 to below the number of processes")
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process,
            "cluster_detection_method": "deactivate"}


@contextlib.contextmanager
def joined(coordinator: str | None = None, processes: int | None = None, process: int | None = None, *,
           patience: float = 300, silence: float = 120) -> Iterator[None]:
    """Be one of a run's processes, if there are several; enter it before jax does anything.

    What is raised inside ends this process, with the message and code of `acejax.cli.main`, and soon all others. Only
    SystemExit passes through: all processes raise it together.

    Args:
      coordinator, processes, process: flags; None for what the launcher says.
      patience: seconds that all processes have for finding each other. Then: one message, exit code 2.
      silence: seconds without a sign of life after which a process is given up. Then: one message, exit code `LOST`.

    Raises:
      UserError: wrong flags, or what jax's search for the others finds wrong.
    """
    tpu = importlib.util.find_spec("libtpu") is not None and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    how = given(coordinator, processes, process) or launched(os.environ, tpu)
    if not how:
        yield
        return
    _initialize(how, patience, silence)
    watch = _Watch(silence)
    watch.start()
    try:
        yield
    except SystemExit:
        watch.finish()
        raise
    except BaseException as error:
        watch.fail(error)
    watch.finish()


def _initialize(how: Mapping[str, Any], patience: float, silence: float) -> None:
    """`jax.distributed.initialize` within a time; by itself it aborts when that is over, with a stack trace."""
    timer = threading.Timer(patience, lambda: _leave(2, _missing(how, patience)))
    timer.daemon = True
    timer.start()
    try:
        # A program of several CPU processes that comes from the compile cache waits for the others for ever (jax 0.10).
        if "cpu" in (jax.config.jax_platforms or "cpu"):
            jax.config.update("jax_enable_compilation_cache", False)
        jax.distributed.initialize(**how, initialization_timeout=int(patience) + 60,
                                   heartbeat_timeout_seconds=int(2 * silence + 6 * GRACE))  # after our own signs
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the run's processes do not find each other: {error}") from error
    finally:
        timer.cancel()


def _missing(how: Mapping[str, Any], patience: float) -> str:
    """Why there is no run yet, seen from here."""
    address = how.get("coordinator_address")
    if address is None:
        return f"the run's other processes were not found within {patience:g} s"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"--coordinator={address} cannot be reached since {patience:g} s: {error}"
    return (f"not all of the {how['num_processes']} processes have come to --coordinator={address} within "
            f"{patience:g} s")


def _leave(code: int, text: str) -> NoReturn:
    """End this process from any thread, at once: jax's own way out waits for processes that may be gone."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(f"acejax: {text}", file=sys.stderr, flush=True)
    os._exit(code)


class _Watch(threading.Thread):
    """Shows that this process lives, and looks after the others."""

    def __init__(self, silence: float):
        super().__init__(name="acejax-watch", daemon=True)
        self._client = distributed.global_state.client
        self._index, self._count = distributed.global_state.process_id, distributed.global_state.num_processes
        self._silence = silence
        self._stopped = threading.Event()

    def run(self) -> None:
        heard: dict[int, tuple[str, float]] = {}  # of each process: its last sign, and when it came
        failed: dict[int, float] = {}
        sign = 0
        while not self._stopped.wait(PERIOD):
            sign += 1
            self._tell("alive", str(sign))
            now, alive, ended = time.monotonic(), self._told("alive"), self._told("ended")
            for other in set(range(self._count)) - {self._index}:
                if ended.get(other) == "":
                    continue
                if other in ended:
                    if now - failed.setdefault(other, now) > GRACE:
                        self._miss(other, f"has failed: {ended[other]}")
                elif heard.get(other, ("", 0.0))[0] != (sign_of := alive.get(other, "none")):
                    heard[other] = sign_of, now
                elif now - heard[other][1] > self._silence:
                    self._miss(other, f"has given no sign of life for {self._silence:g} s")

    def finish(self) -> None:
        """Wait for the others to come to their end as well; one that does not ends this process too."""
        self._tell("ended", "")
        while len(self._told("ended")) < self._count:
            time.sleep(PERIOD / 4)
        self._stopped.set()
        self.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the others why, and leave."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(self._silence + 2 * GRACE)  # most likely another process is gone: `run` says which
        if not isinstance(error, UserError | KeyboardInterrupt):
            traceback.print_exception(error)
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
        self._tell("ended", text or type(error).__name__)
        if self._index == 0:  # the store goes with this process
            until = time.monotonic() + 3 * GRACE
            while len(self._told("ended")) < self._count and time.monotonic() < until:
                time.sleep(PERIOD / 4)
        _leave({UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1), text)

    def _miss(self, other: int, what: str) -> NoReturn:
        if self._index == 0:
            time.sleep(GRACE)  # the others see it as well, as long as the store is there
        _leave(LOST, f"process {other} of {self._count} {what}; the same command on all of them goes on from the last "
                     "checkpoint")

    def _tell(self, what: str, text: str) -> None:
        self._ask(self._client.key_value_set, f"acejax/{what}/{self._index}", text, allow_overwrite=True)

    def _told(self, what: str) -> dict[int, str]:
        found = self._ask(self._client.key_value_dir_get, f"acejax/{what}/")
        return {int(key.rpartition("/")[2]): text for key, text in found}

    def _ask(self, call, *args, **kwargs) -> Any:
        try:
            return call(*args, **kwargs)
        except jax.errors.JaxRuntimeError:
            self._miss(0, "cannot be reached")
