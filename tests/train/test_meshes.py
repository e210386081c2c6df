"""One seed has the same losses on every mesh, of one process and of two; processes of a run end together."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from acejax import UserError
from acejax.parallel import processes
from tests.counts import count
from tests.train.small import losses

ROOT = pathlib.Path(__file__).parents[2]
STEPS = count(5, 20)
ONE = count({"mixed": {"data": 2, "fsdp": 2, "tensor": 2}, "seq": {"fsdp": 4, "seq": 2}},
            {"data": {"data": 8}, "fsdp": {"fsdp": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
             "seq": {"fsdp": 4, "seq": 2}, "tensor_seq": {"fsdp": 2, "tensor": 2, "seq": 2}})
TWO = {"fsdp": {"fsdp": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2},  # whose processes have every second part
       "across": {"tensor": 2, "seq": 4}}  # whose rows each lie on devices of both processes


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses of one device."""
    return train(tmp_path_factory.mktemp("alone"), {"one": {}})["one"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.train.meshed", *arguments], cwd=ROOT, env=os.environ.copy(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(workdir: pathlib.Path, meshes: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """The losses on each mesh, trained in a process of its own: jax settles how many devices there are as it starts."""
    process = start(str(workdir), str(STEPS), json.dumps(meshes))
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return {name: losses(workdir / name) for name in meshes}


@pytest.mark.long
def test_every_mesh_has_the_losses_of_one_device(expected, tmp_path):
    for name, found in train(tmp_path, ONE).items():
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


@pytest.mark.long
def test_adafactor_has_its_losses_on_a_mesh(tmp_path):
    """Its means over rows and columns are of whole kernels, wherever their parts lie."""
    kind = {"optimizer": "adafactor"}
    expected = train(tmp_path, {"one": kind})["one"]
    np.testing.assert_allclose(train(tmp_path, {"fsdp": {"fsdp": 8} | kind})["fsdp"], expected, rtol=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("base", ["float32", "int8"])
def test_a_lora_has_its_losses_on_every_mesh(tmp_path, base):
    """The base lies by the rules of the parameters, the factors by theirs."""
    expected = train(tmp_path, {"one": {"lora": base}})["one"]
    for name, found in train(tmp_path, {name: mesh | {"lora": base} for name, mesh in ONE.items()}).items():
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


@pytest.mark.long
def test_two_processes_have_the_losses_of_one_device(expected, tmp_path):
    port = free_port()
    pair = [start(str(tmp_path), str(STEPS), json.dumps(TWO), port, str(index)) for index in range(2)]
    told = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    for name in TWO:
        np.testing.assert_allclose(losses(tmp_path / name), expected, rtol=1e-4, err_msg=name)
    assert "step 1/" in told[0][0] and "step" not in told[1][0], "the first one alone speaks"


@pytest.mark.long
def test_when_a_process_is_killed_the_other_says_so_and_its_last_checkpoint_restores(tmp_path):
    port = free_port()
    pair = [start(str(tmp_path), "100000", json.dumps({"run": {"fsdp": 8}}), port, str(index), "8")
            for index in range(2)]
    try:
        assert any(line.startswith("step 8/") for line in pair[0].stdout), pair[0].stderr.read()
        pair[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, said = pair[0].communicate(timeout=60)
    finally:
        for process in pair:
            process.kill()
    assert pair[0].returncode == processes.LOST and time.monotonic() - killed < 45
    assert [line for line in said.splitlines() if line.startswith("acejax:")] == [
        "acejax: process 1 of 2 has given no sign of life for 8 s; the same command on all of them goes on from the "
        "last checkpoint"]
    done = start(str(tmp_path), "100000", json.dumps({"run": {"fsdp": 4, "tensor": 2}}))
    try:
        line = next(line for line in done.stdout if line.startswith("resuming"))
        assert int(re.search(r"at step (\d+)", line)[1]) >= 3
    finally:
        done.kill()


@pytest.mark.long
def test_a_coordinator_that_is_not_there_is_named_in_time(tmp_path):
    script = ("from acejax.parallel import processes\n"
              "with processes.joined('localhost:{}', 2, {}, patience=3): pass")
    for process, message in ((1, "cannot be reached"), (0, "not all of the 2 processes have come")):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script.format(free_port(), process)], cwd=ROOT,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and time.monotonic() - started < 40
        assert re.fullmatch(f"acejax: .*{message}.*\n", done.stderr), done.stderr


def test_heads_and_tokens_that_do_not_fall_apart_are_named(tmp_path):
    """Before anything is written; a mesh needs as many devices as it has places, so the checks are called with one."""
    from acejax.parallel import rules
    mesh = type("Mesh", (), {"shape": {"data": 1, "fsdp": 1, "tensor": 2, "seq": 2}})
    with pytest.raises(UserError, match="num_heads is 6, no multiple of tensor x seq = 4"):
        rules.check_heads(mesh, 6)
    with pytest.raises(UserError, match="text: 3 tokens are no multiple of the mesh's seq = 2"):
        rules.check_tokens(mesh, "text", 3)
