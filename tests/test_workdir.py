"""Who may write into a workdir: one run at a time, of one config."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from acejax import UserError, workdir

ROOT = pathlib.Path(__file__).parents[1]
HOLD = """
import sys, time
from acejax.workdir import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(place: pathlib.Path) -> subprocess.Popen:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    """kill -9 frees the lock; what the second run finds stays as it was."""
    place = tmp_path / "run"
    with hold(place) as other:
        before = (place / workdir.LOCK).read_bytes(), (place / workdir.LOCK).stat().st_mtime_ns
        told = f"in use by process {other.pid} on .* since .*; wait for it, stop it, or"
        with pytest.raises(UserError, match=told), workdir.lock(place):
            raise AssertionError("both hold it")
        assert before == ((place / workdir.LOCK).read_bytes(), (place / workdir.LOCK).stat().st_mtime_ns)
        other.kill()
    with workdir.lock(place):
        assert json.loads((place / workdir.LOCK).read_text())["pid"] == os.getpid()


def test_a_run_that_failed_at_once_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), workdir.lock(tmp_path / "run"):
        raise KeyError
    assert not (tmp_path / "run").exists()
    with workdir.lock(tmp_path / "run"):
        workdir.claim(tmp_path / "run", {"a": 1})
    with workdir.lock(tmp_path), workdir.lock(tmp_path / "run"):
        pass
    assert tmp_path.is_dir() and (tmp_path / "run" / "config.json").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(UserError, match="cannot be written"), workdir.lock(place):
            raise AssertionError("entered")


def test_a_lease_is_held_refreshed_and_given_back(tmp_path):
    """As on an object store, at a hundredth of its times."""
    place, refresh = epath.Path(tmp_path / "run"), 0.15
    with workdir._lease(place, refresh):
        started = time.time()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), workdir._lease(place, refresh):
            raise AssertionError("both hold it")
        assert time.time() - started < workdir.PATIENCE * refresh, "a lease that lives is seen before time is up"
    assert not (place / workdir.LOCK).exists()


def test_a_dead_runs_lease_is_taken_over(tmp_path):
    place, refresh = epath.Path(tmp_path), 0.1
    (place / workdir.LOCK).write_text(json.dumps({"host": "gone", "pid": 1, "since": "then", "beat": 7}))
    started = time.time()
    with workdir._lease(place, refresh):
        assert time.time() - started >= workdir.PATIENCE * refresh
        assert json.loads((place / workdir.LOCK).read_text())["pid"] == os.getpid()


def test_a_run_whose_lease_was_taken_over_stops(tmp_path, capfd):
    """It was silent for so long that another run took it for dead: it neither signs nor removes the other's lease.

    As a background job of a shell it does not hear SIGINT.
    """
    place, other = tmp_path / "run", {"host": "elsewhere", "pid": 1, "since": "now", "beat": 1}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), workdir._lease(place, 0.2):
            for _ in range(100):  # again, as a signature may have been on its way; a long sleep is not interrupted
                (place / workdir.LOCK).write_text(json.dumps(other))
                time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((place / workdir.LOCK).read_text()) == other
    assert "is in use by process 1 on elsewhere" in capfd.readouterr().err


def test_two_leases_at_once(tmp_path, monkeypatch):
    """Both find none: at most one goes on."""
    place, entered = epath.Path(tmp_path), []
    names = iter("ab")
    monkeypatch.setattr(workdir, "_me", lambda: {"host": next(names), "pid": 1, "since": ""})

    def run() -> None:
        try:
            with workdir._lease(place, 0.4):
                entered.append(1)
                time.sleep(0.5)
        except UserError:
            pass

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) <= 1


def test_a_workdir_belongs_to_its_config_and_data(tmp_path):
    workdir.agree(tmp_path, {"a": 1})
    assert not list(tmp_path.iterdir())
    workdir.claim(tmp_path, {"a": 1, "how": {"x": 1}}, ("how",))
    workdir.claim(tmp_path, {"a": 1, "how": {"x": 2}}, ("how",))
    with pytest.raises(UserError, match=r"config\.a = 1, this one has 2"):
        workdir.agree(tmp_path, {"a": 2, "how": {"x": 1}}, ("how",))
    workdir.claim_data(tmp_path, "abc")
    with pytest.raises(UserError, match="was abc, now it is xyz"):
        workdir.claim_data(tmp_path, "xyz")
