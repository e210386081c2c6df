"""A run's folder belongs to one config, one data set, and one run at a time."""

import _thread
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from acejax.errors import UserError
from acejax.parallel import processes

LOCK = "lock.json"
REFRESH = 15.0  # seconds between two signs of life in a lease
PATIENCE = 4  # times REFRESH without one: its run is dead
STOP = signal.SIGUSR2  # that a run whose lease was taken over sends itself


def agree(workdir: epath.PathLike, config: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """As `claim`, writing nothing: for a run that may still fail before it starts."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    found, wanted = (_flatten(one) for one in (json.loads(path.read_text()), json.loads(json.dumps(config))))
    for field in sorted(found.keys() | wanted.keys()):
        if found.get(field) != wanted.get(field) and not f"{field}.".startswith(tuple(f"{name}." for name in free)):
            raise UserError(
                f"workdir {workdir} holds a run with config.{field} = {found.get(field)!r}, this one has "
                f"{wanted.get(field)!r}; give another --workdir, or the config it was started with")


def claim(workdir: epath.PathLike, config: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """Bind a workdir to a config: the first run writes `config.json`, a later one must agree with it.

    The fields `free`, and all below them, say how a run is computed, not what it computes, and may change.

    Raises:
      UserError: the workdir holds a run of another config, naming the first field that differs, or can't be written.
    """
    agree(workdir, config, free)
    _write(epath.Path(workdir) / "config.json", config)


def claim_data(workdir: epath.PathLike, digest: str) -> None:
    """Bind a workdir to the data that a run reads, as `claim`: the first run writes `data.json`.

    Raises:
      UserError: the run began with other data, or the workdir can't be written.
    """
    path = epath.Path(workdir) / "data.json"
    if path.exists() and (found := json.loads(path.read_text())["digest"]) != digest:
        raise UserError(f"workdir {workdir}: the data has changed since this run began (the digest of its features was "
                        f"{found}, now it is {digest}); give another --workdir, or the data it was started with")
    _write(path, {"digest": digest})


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """Hold a workdir; a second run in it is refused before it touches anything. Every process of a run enters.

    Process 0 locks for all. On a disk that is an advisory lock (flock) on `lock.json`, which the system frees when the
    run ends, however it ends. An object store has no locks: there `lock.json` is a lease, rewritten every REFRESH
    seconds. Who finds one watches it for PATIENCE times as long, and takes it over if nothing changes, so that no
    clocks are compared. Two runs that find none in the same second both write theirs and look again soon after; the
    one that was overwritten is refused. That is no proof: a store may take longer to show the other's.

    Raises:
      UserError: another run holds it, naming its host and process; or the workdir can't be written.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if jax.process_index() == 0:
            try:
                held.enter_context(_lease(epath.Path(workdir)) if "://" in os.fspath(workdir)
                                   else _flock(epath.Path(workdir).expanduser()))
            except UserError as error:
                problem = error
        if jax.process_count() > 1:
            refused = bool(multihost_utils.broadcast_one_to_all(np.array(problem is not None)))
            problem = problem or (UserError(f"workdir {workdir}: refused by process 0") if refused else None)
        if problem:
            raise problem
        yield


@contextlib.contextmanager
def _flock(workdir: epath.Path) -> Iterator[None]:
    path, made = workdir / LOCK, not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - a lock needs a descriptor
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(workdir, path) from None
        except OSError as error:
            raise UserError(f"workdir {workdir}: its file system has no locks ({error})") from error
        if not path.exists() or os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
            raise _taken(workdir, path)  # its holder has just removed it
        file.truncate(0)
        json.dump(_me(), file)
        file.flush()
        try:
            yield
        finally:
            if made and [one.name for one in workdir.iterdir()] == [LOCK]:  # a run that failed before it began
                path.unlink()
                workdir.rmdir()


@contextlib.contextmanager
def _lease(workdir: epath.Path, refresh: float = REFRESH) -> Iterator[None]:
    path, me, beats = workdir / LOCK, _me(), 0

    def sign() -> None:
        nonlocal beats
        beats += 1
        try:
            path.write_text(json.dumps(me | {"beat": beats}))
        except OSError as error:
            raise UserError(f"workdir {workdir} cannot be written: {error}") from error

    found, until = _content(path), time.time() + PATIENCE * refresh
    while found and time.time() < until:
        time.sleep(refresh / 4)
        if (now := _content(path)) and now != found:
            raise _taken(workdir, path)
        found = now
    workdir.mkdir(parents=True, exist_ok=True)
    sign()
    time.sleep(refresh / 8)  # for another's that was on its way
    if _owner(path) != me:
        raise _taken(workdir, path)
    stop = threading.Event()

    def refreshing() -> None:
        while not stop.wait(refresh):
            if (owner := _owner(path)) and owner != me:  # this run was silent for so long that another took it for dead
                print(f"acejax: {_taken(workdir, path)}", file=sys.stderr, flush=True)
                _thread.interrupt_main(STOP)
                return
            with contextlib.suppress(UserError):  # the store may be away for a while; saving will tell
                sign()

    thread = threading.Thread(target=refreshing, daemon=True)
    with _interruptible():
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if _owner(path) == me:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """STOP raises KeyboardInterrupt in the main thread, as Ctrl-C does, which a shell's background jobs do not hear."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(STOP, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(STOP, before)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}


def _owner(path: epath.Path) -> dict[str, Any]:
    try:
        return {name: value for name, value in json.loads(_content(path)).items() if name != "beat"}
    except ValueError:  # caught while it is being written
        return {}


def _content(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _taken(workdir: epath.Path, path: epath.Path) -> UserError:
    owner = _owner(path)
    return UserError(f"workdir {workdir} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
                     f"since {owner.get('since', '?')}; wait for it, stop it, or give another --workdir")


def _write(path: epath.Path, content: dict[str, Any]) -> None:
    if not processes.is_first():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f"{path.name}.tmp"
        beside.write_text(json.dumps(content, indent=2))
        beside.replace(path)
    except OSError as error:
        raise UserError(f"workdir {path.parent} cannot be written: {error}") from error


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
