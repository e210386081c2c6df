"""`python -m tests.aot.reduced [--write]`: a model of 5 + 5 blocks for v6e-8 costs what it did; needs libtpu, no TPU.

ACE++'s width, 512 + 4,096 tokens, one sample a device: cycles of the forward pass and of the full fine-tune step
outside kernels, and of each kernel by its schedule, within 5 % of those in `reduced.json`. `--write` records them anew:
do so where a change is meant to cost more, or with another libtpu. Then a small model's step on two slices.
"""

import json
import os
import pathlib
import sys
import time

from acejax import aot

if __name__ == "__main__":
    os.environ.update(aot.ENVIRONMENT)  # before jax starts

from acejax.aot import compiler
from acejax.cli import plan as command
from acejax.cli.config import folder, parse_config
from acejax.parallel.chips import topology
from acejax.train.config import TrainConfig
from acejax.train.plan_compile import compile_for
from benchmarks import tpu_side

RECORD = pathlib.Path(__file__).with_name("reduced.json")
TOLERANCE = 0.05
SLICE, SLICES = "v6e-8", "v6e-4x2"
BLOCKS = {"depth": tpu_side.BLOCKS, "depth_single_blocks": tpu_side.BLOCKS}
SMALL = {"hidden_size": 512, "num_heads": 4, "depth": 2, "depth_single_blocks": 2}


def run(name: str, model: dict[str, int]) -> TrainConfig:
    changed = [f"--config.model.{field}={value}" for field, value in model.items()]
    _, config = parse_config("plan", [f"--config={folder() / 'ace_plus.py'}:{name}", *changed], command._define)
    return TrainConfig.of(config)


def found() -> dict:
    """Cycles of the forward pass, of the step, and of its kernels."""
    here = topology(SLICE)
    function, arguments, _ = tpu_side.blocks(SLICE, "")
    _, forward = compiler.compile(function.lower(*arguments), here, schedules=False)
    print(f"forward: {forward.cycles:,} cycles outside kernels ({forward.compile_seconds:.0f} s)", flush=True)
    step = compile_for(run(SLICE, BLOCKS), here, here.devices, tpu_side.IMAGE, tpu_side.TEXT)
    print(f"step: {step.cycles:,} cycles outside kernels, {step.kernel_cycles:,.0f} in them, "
          f"{step.peak / 2**30:.2f} GiB ({step.compile_seconds:.0f} s)", flush=True)
    return {"versions": dict(step.versions), "forward": forward.cycles, "step": step.cycles,
            "kernels": {name: kernel.cycles for name, kernel in step.kernels.items()}}


def differences(recorded: dict, now: dict) -> list[str]:
    """Lines of what is not within the tolerance, or is new or gone."""
    pairs = {name: (recorded[name], now[name]) for name in ("forward", "step")}
    pairs |= {name: (recorded["kernels"].get(name), now["kernels"].get(name))
              for name in {**recorded["kernels"], **now["kernels"]}}
    lines = []
    for name, (before, after) in pairs.items():
        if before is None or after is None:
            lines.append(f"{name}: {'not recorded' if before is None else 'gone'}")
        elif abs(after / before - 1) > TOLERANCE:
            lines.append(f"{name}: {after:,} cycles, recorded {before:,} ({after / before - 1:+.1%})")
    return lines


def two_slices() -> None:
    """The step of a small model with a slice on each half of `data`: gradients go between them, parameters do not."""
    there = topology(SLICES)
    step = compile_for(run(SLICES, SMALL), there, there.devices, 256, 128, schedules=False)
    assert step.collectives.get("all-reduce", 0) > 0 and step.collectives.get("all-gather", 0) > 0, step.collectives
    print(f"{SLICES}: {step.peak / 2**20:.0f} MiB, {step.cycles:,} cycles ({step.compile_seconds:.0f} s)")


def main(argv: list[str]) -> int:
    started = time.monotonic()
    now = found()
    two_slices()
    print(f"{time.monotonic() - started:.0f} s in all")
    if "--write" in argv:
        RECORD.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        return 0
    if not RECORD.is_file():
        print(f"{RECORD.name} is not there: python -m tests.aot.reduced --write")
        return 1
    recorded = json.loads(RECORD.read_text())
    lines = differences(recorded, now)
    if lines and recorded["versions"] != now["versions"]:
        lines.append(f"recorded with {recorded['versions']}, here {now['versions']}")
    print("\n".join(lines) or f"all within {TOLERANCE:.0%} of {RECORD.name}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
