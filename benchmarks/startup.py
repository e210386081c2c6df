"""The first and the second start of a command: seconds, and how many programs were compiled.

An edit with the weights that come with acejax, and a training run of the demo's size that was stopped after its first
step of two and goes on. Each start is a process of its own, from Python's start to its end. Beside them a second start
with the thresholds that jax has by itself, which keeps only what compiled for a second or longer, and one of the run
that finds its compiled step (`--executables`).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from acejax.cli.config import folder
from acejax.data.written import check_place

CHECKOUT = Path(__file__).parents[1]
SAVED = ", saved executable"
JAX_OWN = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1.0"}


def main(argv: list[str]) -> int:
    """Start each command with an empty cache and with a filled one; 1 where the second start compiled anything."""
    parser = argparse.ArgumentParser(prog="acejax bench startup", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="second starts, of which the median is told")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    check_place(args.json)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, prepare in (("edit", _edit), ("train", _train)):
            rows[name] = _measure(Path(scratch, name), prepare, args.repeats)
    print(f"{'':34}{'first s':>9}{'second s':>10}{'programs':>10}{'compiled':>10}")
    for name, row in rows.items():
        for kind in [start.removeprefix("first") for start in row if start.startswith("first")]:
            first, second = row["first" + kind], row["second" + kind]
            print(f"{name + kind:34}{first['seconds']:9.1f}{second['seconds']:10.1f}{second['programs']:10}"
                  f"{second['compiled']:10}")
    if args.json:
        args.json.write_text(json.dumps({
            "command": "acejax bench startup", "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            "repeats": args.repeats, "rows": rows}, indent=1) + "\n")
    return 1 if any(row[name]["compiled"] for row in rows.values() for name in ("second", "second" + SAVED)
                    if name in row) else 0


def _measure(place: Path, prepare, repeats: int) -> dict[str, dict[str, float]]:
    """All kinds in turns, so that a machine that is busy for a while slows all of them."""
    kinds, found, runs = {"": {}, ", jax's thresholds": JAX_OWN} | ({SAVED: {}} if prepare is _train else {}), {}, {}
    for kind, environment in kinds.items():
        here = place / (kind.strip(", ") or "ours")
        here.mkdir(parents=True)
        argv, again = prepare(here)
        runs[kind] = here, environment, argv + [f"--executables={here / 'steps'}"] * (kind == SAVED), again, []
        found["first" + kind] = start(here, runs[kind][2], environment)
    for here, environment, argv, again, made in repeats * [*runs.values()]:
        again()
        made.append(start(here, argv, environment))
    for kind, (*_, made) in runs.items():
        found["second" + kind] = {"seconds": statistics.median(run["seconds"] for run in made),
                                  "programs": made[0]["programs"], "compiled": max(run["compiled"] for run in made)}
    return found


def _edit(place: Path):
    """The arguments of an edit, and what there is to do before it is made again."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (96, 128, 3)).astype(np.uint8)).save(place / "photo.png")
    mask = np.zeros((96, 128), np.uint8)
    mask[30:70, 40:80] = 255
    Image.fromarray(mask).save(place / "mask.png")
    return ["edit", "--demo", f"--image={place / 'photo.png'}", f"--mask={place / 'mask.png'}", "--prompt=a red heart",
            f"--out={place / 'out.png'}"], lambda: None


def _train(place: Path):
    """Likewise of a run; its last checkpoint is taken away, as if it had been stopped before."""
    run = place / "run"
    argv = ["train", f"--config={folder() / 'demo.py'}", f"--workdir={run}", "--config.steps=2",
            "--config.checkpoint.every=1", "--config.data.samples=40"]
    return argv, lambda: shutil.rmtree(run / "checkpoints" / "2")


def start(place: Path, argv: list[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds of a command in a process of its own, `programs` and how many were `compiled`, by `benchmarks.compiles`.

    Args:
      place: a folder; its `cache` keeps the programs.
      argv: of `acejax`.
      environment: variables beside those that there are.

    Raises:
      RuntimeError: it failed.
    """
    report = place / "compiles.json"
    line = [sys.executable, "-m", "benchmarks.compiles", str(report), *argv, f"--compile_cache={place / 'cache'}"]
    paths = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_PERSISTENT_CACHE")}
    before = time.monotonic()
    done = subprocess.run(line, env=inherited | {"PYTHONPATH": paths} | (environment or {}), capture_output=True,
                          text=True, check=False)
    seconds = time.monotonic() - before
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"seconds": round(seconds, 2)} | json.loads(report.read_text())
