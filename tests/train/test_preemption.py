"""Runs of two processes: SIGTERM to one, damage to the part of one, an export of both parts."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import acejax
from acejax.model.mmdit import init
from acejax.train.preemption import Preemption
from tests.train.small import make_config

ROOT = pathlib.Path(__file__).parents[2]


def test_a_signal_is_kept_for_the_end_of_the_step():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2)
    assert signal.getsignal(signal.SIGTERM) is before


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


class Pair:
    """Two processes of `tests.train.pair`."""

    def __init__(self, workdir: pathlib.Path, order: str):
        port = free_port()
        self.processes = [subprocess.Popen(
            [sys.executable, "-m", "tests.train.pair", str(workdir), port, str(process), order], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for process in range(2)]

    def wait_for(self, line: str) -> None:
        for process in self.processes:
            assert any(found == f"{line}\n" for found in process.stdout), process.stderr.read()

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, last lines and everything on stderr."""
        told = [process.communicate(timeout=120) for process in self.processes]
        return ([process.returncode for process in self.processes],
                [out.splitlines()[-1] if out else "" for out, _ in told], [err for _, err in told])


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A run that one of two processes was asked to leave, the other not."""
    workdir = tmp_path_factory.mktemp("pair")
    pair = Pair(workdir, "count")
    pair.wait_for("step 25")
    pair.processes[1].send_signal(signal.SIGTERM)
    return workdir, *pair.end()


@pytest.mark.long
def test_a_signal_to_one_of_two_ends_both_at_the_same_step(counted):
    workdir, codes, lines, errors = counted
    assert codes == [75, 75], errors
    steps = {re.fullmatch(r"left after (\d+)", line)[1] for line in lines}
    assert len(steps) == 1 and int(steps.pop()) == max(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.long
def test_damage_to_the_part_of_one_process_is_seen_by_both(counted):
    """Another mesh, another dtype; what only process 1 reads is damaged in the newest step."""
    workdir, *_ = counted
    newest, older = sorted((int(path.name) for path in (workdir / "checkpoints").iterdir()), reverse=True)
    codes, lines, errors = Pair(workdir, "restore").end()
    assert codes == [0, 0] and set(lines) == {f"restored {newest} bfloat16 right"}, (lines, errors)
    for path in (workdir / "checkpoints" / str(newest) / "state" / "ocdbt.process_1").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    codes, lines, errors = Pair(workdir, "restore").end()
    assert codes == [0, 0] and set(lines) == {f"restored {older} bfloat16 right"}, (lines, errors)
    assert (workdir / "damaged" / str(newest)).is_dir()
    assert sum("is damaged" in told for told in errors) == 1


@pytest.mark.long
def test_an_export_of_two_processes_is_whole(tmp_path):
    codes, lines, errors = Pair(tmp_path, "export").end()
    assert codes == [0, 0], errors
    config = acejax.MMDiTConfig(**make_config().model)
    _, loaded = acejax.load_mmdit(tmp_path / "exports" / "step_000001.safetensors", config)
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-6), loaded,
                 jax.jit(init, static_argnums=0)(config, jax.random.key(0)))


@pytest.mark.long
def test_training_on_two_processes_leaves_and_goes_on(tmp_path):
    """The training loop itself; it goes on in one process, on another mesh."""
    port = free_port()
    pair = [subprocess.Popen([sys.executable, "-m", "tests.train.meshed", str(tmp_path), "100000",
                              '{"run": {"fsdp": 8}}', port, str(process)], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for process in range(2)]
    assert any(line.startswith("step 8/") for line in pair[0].stdout), pair[0].stderr.read()
    pair[1].send_signal(signal.SIGTERM)
    out, said = pair[0].communicate(timeout=120)
    assert [process.wait(120) for process in pair] == [75, 75], said
    step = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert out.splitlines()[-1] == f"preempted: step {step} is saved; the same command goes on from there"
    again = subprocess.Popen([sys.executable, "-m", "tests.train.meshed", str(tmp_path), "100000",
                              '{"run": {"fsdp": 4, "tensor": 2}}'], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.endswith(f" at step {step}\n") for line in again.stdout)
    finally:
        again.kill()
