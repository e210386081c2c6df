"""Speed and memory of the 12B model on one 80 GB GPU, each figure beside PyTorch's: `benchmarks/gpu.sh [PART ...]`.

  step     a step of the sampler: forward pass and Euler, the modulation of all steps made beforehand
  lora     a training step of a LoRA: rank 64, 304 modules, AdamW, the base in bfloat16
  qlora    the same with the base in int8 (no peer)
  fused    a training step of all parameters in bfloat16: Adafactor, each block moved as soon as its gradient is there
  unfused  the same with a gradient tree (no peer)

448 channels, 512 text and 4,096 image tokens, bfloat16, cuDNN attention, random weights made on the device; training
recomputes blocks. The peer (`benchmarks.torch_mmdit`) has the same architecture and first has to give the same numbers
at tiny size. Each side is a process of its own, both take turns (`--rounds`), and each part ends within `--seconds`.
What a side has no memory for is a row that says so. TFLOP/s and MFU are by `acejax.model.flops`: what is recomputed
does not count. "compile s" is, of the peer, its first step. Where there is no GPU, all runs at tiny size on the CPU,
and rows say "not measured".
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acejax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("step", "lora", "qlora", "fused", "unfused")
PEERS = ("step", "lora", "fused")
TRAINED = {"lora": True, "qlora": True, "fused": False, "unfused": False}  # a LoRA, or all
ALONE = {"jax": "jax[cuda13]"}  # wheels that are called otherwise than their module
NEEDED = ("jax", "flax", "optax", "numpy", "etils", "safetensors")
NOT = "not measured"

# One GPU has no collectives, and the flags about those (the latency hiding scheduler among them) do nothing here. Two
# settings of NVIDIA's page on jax's performance on GPUs (docs.nvidia.com/jax-toolbox) are left: its products by cuBLAS
# alone, as all of ours are large (and tuning Triton's for each of their shapes takes minutes of a part's ten); and nine
# tenths of the memory instead of three quarters. What XLA_FLAGS has already comes later and wins.
XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false"
MEMORY = "0.9"


@dataclasses.dataclass(frozen=True)
class Suite:
    """What to run, and for how long."""

    parts: tuple[str, ...]
    tiny: bool
    work: Mapping[str, Any]
    rounds: int
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Run parts, print a table, write JSON; 1 where a side failed other than for want of memory.

    Raises:
      UserError: a flag that can't be, a module that is missing, or a peer that computes something else.
    """
    parser = argparse.ArgumentParser(prog="acejax bench gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="at tiny size; where there is no GPU, always")
    parser.add_argument("--tokens", type=int, help="image tokens (default: 4096)")
    parser.add_argument("--text", type=int, help="text tokens (default: 512)")
    parser.add_argument("--samples", type=int, default=1, help="of a batch (default: 1)")
    parser.add_argument("--remat", default="full", choices=("full", "attention", "none"),
                        help="what our LoRA steps recompute; the peer does or does not (default: full)")
    parser.add_argument("--torch_compile", default="max-autotune-no-cudagraphs", metavar="MODE",
                        help="the peer's; a step is 57 blocks of milliseconds, so that launches are hidden without "
                        "CUDA graphs (default: max-autotune-no-cudagraphs)")
    parser.add_argument("--repeats", type=int, help="measured steps a round (default: 20)")
    parser.add_argument("--rounds", type=int, help="turns of each side (default: 2)")
    parser.add_argument("--seconds", type=float, default=540, help="a part may take (default: 540)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.parts) - set(PARTS)):
        raise UserError(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    for name in ("tokens", "text", "samples", "repeats", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: not a file in an existing folder")
    check_modules()

    tiny = args.tiny or not has_gpu()
    if tiny and not args.tiny:
        print("no GPU: the same at tiny size on the CPU; what needs the GPU is not measured")
    size = {"tokens": 24, "text": 5, "repeats": 2} if tiny else {"tokens": 4096, "text": 512, "repeats": 20}
    work = {name: getattr(args, name) or default for name, default in size.items()} | {
        "tiny": tiny, "samples": args.samples, "remat": args.remat, "torch_compile": args.torch_compile}
    report = run(Suite(tuple(args.parts) or PARTS, tiny, work, args.rounds or (1 if tiny else 2), args.seconds))
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row.get("failed") for row in report["rows"]))


def check_modules() -> None:
    """Raises UserError with the wheels to carry to a machine without a registry."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        wheels = " ".join(ALONE.get(name, name) for name in missing)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(
            f"this Python lacks {', '.join(missing)}. Where there is no registry, carry the wheels: "
            f"`pip download --no-deps --only-binary=:all: --python-version {version} -d wheels {wheels}` elsewhere, "
            "then `pip install --no-index --no-deps --target site wheels/*.whl` and PYTHONPATH=site here")


def has_gpu() -> bool:
    """In a process of its own: one that has asked holds the GPU's memory."""
    done = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True,
                          text=True)
    return done.stdout.strip().endswith("gpu")


def run(suite: Suite) -> dict[str, Any]:
    """All rows, and what they were measured on."""
    torch = importlib.util.find_spec("torch") is not None
    report = {"command": "benchmarks/gpu.sh", "date": datetime.date.today().isoformat(),
              "python": platform.python_version(), "model": "tiny" if suite.tiny else "12B, 448 channels",
              **suite.work, "rounds": suite.rounds, "xla_flags": environment("ours", None)["XLA_FLAGS"],
              "check": check() if torch else "torch is not installed", "rows": []}
    for part in suite.parts:
        with tempfile.TemporaryDirectory() as scratch:
            report["rows"] += run_part(suite, part, Path(scratch), torch)
    for row in report["rows"]:
        for name, version in row.pop("versions", {}).items():
            report.setdefault("versions", {})[name] = version
    return report


def check() -> dict[str, float]:
    """`benchmarks.gpu_check`, on the CPU."""
    code = "import json; from benchmarks import gpu_check; print(json.dumps(gpu_check.check()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment("peer", None), capture_output=True,
                          text=True)
    if done.returncode:
        raise UserError(f"the PyTorch peer failed its check: {last_line(done.stderr)}")
    return json.loads(done.stdout.splitlines()[-1])


def run_part(suite: Suite, part: str, scratch: Path, torch: bool) -> list[dict[str, Any]]:
    """Rows of a part: ours, and the peer's where it has one."""
    until = time.monotonic() + suite.seconds
    sides = {"ours": [], "peer": []} if part in PEERS else {"ours": []}
    for turn in range(suite.rounds):
        for side, rows in sides.items():
            if any("error" in row for row in rows):
                continue
            if side == "peer" and not torch:
                rows.append({"error": f"{NOT}: torch is not installed"})
            elif turn and time.monotonic() > until - 1.5 * rows[0]["seconds"]:
                print(f"{part}, {side}: no time for turn {turn + 1}")
            else:
                rows.append(run_side(suite, part, side, scratch, until))
    work = flops(suite, part)
    return [row(part, side, rows, work) for side, rows in sides.items()]


def run_side(suite: Suite, part: str, side: str, scratch: Path, until: float) -> dict[str, Any]:
    out, began = scratch / f"{side}.json", time.monotonic()
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_side", side, json.dumps(suite.work | {"part": part}), str(out)]
    print(f"{part}, {side} ...", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(side, None if suite.tiny else scratch),
                              stderr=subprocess.PIPE, text=True, timeout=max(1.0, until - began))
    except subprocess.TimeoutExpired:
        return {"error": f"{NOT}: did not end within the part's {suite.seconds:.0f} s"}
    if done.returncode or not out.exists():
        sys.stderr.write(done.stderr[-4000:])
        return {"error": f"exit code {done.returncode}: {last_line(done.stderr)}", "failed": True}
    return json.loads(out.read_text()) | {"seconds": time.monotonic() - began}


def environment(side: str, caches: Path | None) -> dict[str, str]:
    """Of a side's process. Compiled programs are kept in `caches`, so that only a side's first turn compiles."""
    own = {"XLA_FLAGS": f"{XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip(),
           "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if side == "peer":
        own["JAX_PLATFORMS"] = "cpu"  # it makes inputs with jax, which must not take the GPU's memory
    else:
        own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    if caches:
        own |= {"JAX_COMPILATION_CACHE_DIR": str(caches / "jax"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "torch"),
                "TRITON_CACHE_DIR": str(caches / "triton")}
    return os.environ | own


def flops(suite: Suite, part: str) -> int:
    """Of a step, as MFU counts them."""
    import jax

    from acejax.model import flops
    from acejax.train import lora
    from acejax.train.config import LoraConfig
    from benchmarks.gpu_side import RANK, Work

    jax.config.update("jax_platforms", "cpu")  # this process only counts
    work = Work(part=part, **suite.work)
    if part == "step":
        return flops.forward(work.config, work.text, work.tokens, work.samples).total
    pairs = lora.pairs(LoraConfig(min(RANK, work.config.hidden_size)), work.config) if TRAINED[part] else None
    return flops.training_step(work.config, work.text, work.tokens, work.samples, pairs)


def row(part: str, side: str, turns: list[dict[str, Any]], work: int) -> dict[str, Any]:
    """One line of the result, from a side's turns; what compiling took is the first one's."""
    found = {"part": part, "side": side, "flops": work} | turns[0]
    if "error" in found:
        return found
    for name in [name for name in found if name.startswith("ms")]:
        if found[name] != NOT:
            found[name] = spread([turn[name] for turn in turns if "error" not in turn])
    found["tflops"] = found["mfu"] = NOT
    if found["ms"] != NOT:
        found["peak_gb"] = max(turn["peak_gb"] for turn in turns if "error" not in turn)
        found["tflops"] = work / found["ms"]["median"] / 1e9
        peak = peak_flops(found["device"])
        found["mfu"] = 1e12 * found["tflops"] / peak if peak else f"{NOT}: the peak of {found['device']} is not known"
    return found


def spread(turns: list[list[float]]) -> dict[str, Any]:
    times = [ms for turn in turns for ms in turn]
    return {"median": statistics.median(times), "min": min(times), "max": max(times),
            "turns": [statistics.median(turn) for turn in turns], "all": [round(ms, 3) for ms in times]}


def peak_flops(device: str) -> float | None:
    from acejax.parallel.chips import CHIPS
    return next((chip.flops for chip in CHIPS.values() if re.fullmatch(chip.kind, device)), None)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def show(report: dict[str, Any]) -> None:
    """The table, with the peer's time over ours."""
    print(f"\n{report['model']}, {report['text']} + {report['tokens']} tokens, {report['samples']} a batch\n"
          f"{'part':9}{'side':6}{'ms':>10}  {'(min - max)':20}{'TFLOP/s':>9}{'MFU':>8}{'peak GB':>9}{'compile s':>11}")
    medians = {}
    for one in report["rows"]:
        head = f"{one['part']:9}{one['side']:6}"
        if "error" in one:
            print(f"{head}  {one['error']}")
        elif one["ms"] == NOT:
            print(f"{head}  {NOT} ({one['device']})")
        else:
            ms, mfu = one["ms"], one["mfu"]
            medians[one["part"], one["side"]] = ms["median"]
            print(f"{head}{ms['median']:10.2f}  {'({min:.2f} - {max:.2f})'.format(**ms):20}{one['tflops']:9.1f}"
                  f"{mfu if isinstance(mfu, str) else f'{mfu:.1%}':>8}{one['peak_gb']:9.1f}"
                  f"{one.get('compile_s', one['first_step_s']):11.1f}")
    for part in PEERS:
        if {(part, "ours"), (part, "peer")} <= medians.keys():
            print(f"{part}: the peer takes {medians[part, 'peer'] / medians[part, 'ours']:.2f} times as long")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as mistake:  # as `acejax` does
        sys.exit(f"error: {mistake}")
