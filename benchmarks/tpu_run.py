"""Compile a figure of a checkout by `benchmarks.tpu_side` or `tpu_encoders` and read what it cost; what is there is
kept."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

from acejax import aot
from acejax.aot import compiler, hlo
from acejax.aot.kernels import DUMP
from acejax.errors import UserError
from acejax.parallel.chips import CHIPS

SIDE = pathlib.Path(__file__).with_name("tpu_side.py")
ENCODERS = SIDE.with_name("tpu_encoders.py")  # made of SIDE
# Parts of the package that no compiled program is made of.
APART = ("aot", "cli", "data", "demo", "weights")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a program, of one device.

    Attributes:
      cycles: outside kernels, loops times trips.
      kernels: by signature: calls, and cycles of one call of one core.
      cores: that share a kernel.
      peak: bytes.
      collectives: bytes by kind.
      zero_gathers: bytes of all-reduces that stand for a gather.
      seconds: that compiling took.
    """

    cycles: int
    kernels: dict[str, tuple[int, int]]
    cores: int
    peak: int
    collectives: dict[str, float]
    zero_gathers: float
    seconds: float

    def of_kernels(self, *names: str) -> float:
        """Cycles of all calls of the kernels whose names start so, of all without names; divided by cores."""
        return sum(calls * cycles for name, (calls, cycles) in self.kernels.items()
                   if not names or name.startswith(names)) / self.cores

    @property
    def total(self) -> float:
        return self.cycles + self.of_kernels()


def compile_figure(tree: pathlib.Path, figure: str, cache: pathlib.Path, fresh: bool = False,
                   side: pathlib.Path = SIDE) -> pathlib.Path:
    """The folder of a figure's program, memory and kernels, compiled where it is not there yet.

    Args:
      tree: a checkout.
      figure: as the `FIGURES` of `side` name it.
      cache: of all figures.
      fresh: compile it again.
      side: the program that compiles it.

    Raises:
      UserError: it does not compile.
    """
    folder = cache / key(tree, figure, side)
    folder.mkdir(parents=True, exist_ok=True)
    if fresh or not (folder / "memory.json").is_file():
        _child(tree, side, "compile", figure, folder, {})
    if fresh or not (folder / "kernels.json").is_file():
        with tempfile.TemporaryDirectory() as schedules:
            _child(tree, side, "kernels", figure, folder, {"LIBTPU_INIT_ARGS": DUMP.format(schedules)})
    return folder


def key(tree: pathlib.Path, figure: str, side: pathlib.Path = SIDE) -> str:
    """Of the sources that a program is made of, the versions and the figure."""
    made = hashlib.sha256(SIDE.read_bytes())
    if side != SIDE:
        made.update(side.read_bytes())
    apart = APART if side == SIDE else tuple(part for part in APART if part != "data")  # encoders are of it
    for part in ("acejax", "configs"):
        for path in sorted((tree / part).rglob("*.py")):
            if path.relative_to(tree).parts[1] not in apart:
                made.update(f"{path.relative_to(tree)}\0".encode() + path.read_bytes())
    made.update(repr(versions()).encode())
    return f"{re.sub(r'[^a-z0-9]+', '_', figure)}-{made.hexdigest()[:16]}"


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in compiler.PACKAGES}


def _child(tree: pathlib.Path, side: pathlib.Path, mode: str, figure: str, folder: pathlib.Path, more: dict[str, str]
           ) -> None:
    environment = os.environ | aot.ENVIRONMENT | more | {"PYTHONPATH": str(tree)}
    line = [sys.executable, "-P", str(side), mode, figure, str(folder)]
    done = subprocess.run(line, env=environment, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode:
        raise UserError(f"{figure} of {tree}: {_reason(done.stderr)}")


def _reason(errors: str) -> str:
    lines = [line for line in errors.strip().splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return compiler.explain(lines[-1], None) if lines else errors.strip()[-300:] or "the process was killed"


def cost(folder: pathlib.Path, chip: str, loop: str = "") -> Cost:
    """What a compiled figure costs.

    Args:
      folder: as of `compile_figure`.
      chip: whose cores share kernels.
      loop: count one trip of the loop over the layers of this name alone.

    Raises:
      UserError: a kernel without a schedule.
    """
    text = gzip.decompress((folder / "program.hlo.gz").read_bytes()).decode()
    memory = json.loads((folder / "memory.json").read_text())
    alone = json.loads((folder / "kernels.json").read_text())
    program = hlo.trip(text, loop) if loop else hlo.read(text)
    kernels = {signature: (calls, _cycles(signature, alone)) for signature, calls in program.kernels.items()}
    return Cost(program.cycles, kernels, CHIPS[chip].cores, memory["peak_memory"], program.collectives, program.zeros,
                memory["compile_seconds"])


def _cycles(signature: str, alone: list[dict[str, Any]]) -> int:
    """Of one call of a kernel: bundles of a step of its grid times the steps."""
    name, _, shapes = signature.partition("(")
    for kernel in alone:
        (found,) = hlo.read(kernel["text"]).kernels
        if found.partition("(")[2] == shapes and kernel["name"] in name:
            return kernel["steps"] * kernel["bundles"][hlo.instruction_of(kernel["text"], found)]
    raise UserError(f"no schedule of the kernel {signature}")
