"""Speed of a verified conversion against a plain copy: `acejax bench convert --gb 8`.

A transformer of FLUX's real widths, its depth cut to the size asked for, goes from BFL's layout to diffusers' and back.
Both sides end with fsync and take turns; a ratio is the median of `--repeat` pairs.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from acejax.data.written import check_place
from acejax.errors import UserError
from acejax.model.config import MMDiTConfig
from acejax.weights import keymaps, save

BLOCK = 2**24


def main(argv: list[str]) -> int:
    """Measure and print; `--json` keeps the figures."""
    parser = argparse.ArgumentParser(prog="acejax bench convert", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=8, help="size of the file, in 10^9 bytes of bfloat16")
    parser.add_argument("--repeat", type=int, default=3, help="pairs of copy and conversion, each way")
    parser.add_argument("--folder", default=None, help="where to work; needs three times the size")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    if args.repeat < 1 or not 0 < args.gb < 1000 or args.folder and not pathlib.Path(args.folder).is_dir():
        raise UserError(f"bench convert: found --repeat={args.repeat} --gb={args.gb:g} --folder={args.folder}; "
                        "expected at least one pair, a size, and a folder that is there")
    check_place(args.json)
    config = sized(args.gb)
    nbytes = size(config)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="acejax-convert-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 3 * nbytes:
            raise UserError(f"{folder}: {free / 1e9:.0f} GB are free; {args.gb:g} GB need {3 * nbytes / 1e9:.0f}")
        figures = measure(pathlib.Path(folder), config, args.repeat) | {"bytes": nbytes}
    for way, row in figures["ways"].items():
        print(f"{way:<18} {row['convert_seconds']:6.1f} s   cp {row['cp_seconds']:6.1f} s   "
              f"speed {row['speed_of_cp']:.2f} of cp   peak {row['peak_bytes'] / 1e6:.0f} MB")
    print(f"{nbytes / 1e9:.1f} GB, largest tensor {figures['largest_tensor'] / 1e6:.0f} MB; allowed peak "
          f"{figures['allowed_peak'] / 1e6:.0f} MB")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def sized(gb: float) -> MMDiTConfig:
    """FLUX's Fill transformer with as many blocks, two single ones to a double one, as make up the size."""
    def of(depth: int) -> MMDiTConfig:
        return dataclasses.replace(MMDiTConfig.flux_fill(), depth=depth, depth_single_blocks=2 * depth)

    return of(max(1, round((gb * 1e9 - size(of(1))) / (size(of(2)) - size(of(1)))) + 1))


def size(config: MMDiTConfig) -> int:
    """Bytes of a file in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in keymaps.expected(config, "bfl").values())


def measure(folder: pathlib.Path, config: MMDiTConfig, repeat: int) -> dict:
    """Seconds of `cp` and of conversion, each way, and the greatest memory of a conversion."""
    bfl, diffusers, copy = folder / "bfl.safetensors", folder / "diffusers.safetensors", folder / "copy"
    largest = generate(bfl, config)
    ways = {}
    for source, target, to in ((bfl, diffusers, "diffusers"), (diffusers, bfl, "bfl")):
        pairs = []
        for _ in range(repeat):
            cp = _timed(["cp", str(source), str(copy)], copy)
            target.unlink(missing_ok=True)
            ours = _timed([sys.executable, "-m", "acejax.cli.main", "convert", str(source), str(target), "--to", to])
            pairs.append((cp[0], *ours))
        ratios = [cp / ours for cp, ours, _ in pairs]
        ways[f"to {to}"] = {
            "cp_seconds": statistics.median(pair[0] for pair in pairs),
            "convert_seconds": statistics.median(pair[1] for pair in pairs),
            "speed_of_cp": statistics.median(ratios), "pairs": [pair[:2] for pair in pairs],
            "peak_bytes": max(pair[2] for pair in pairs)}
        if to == "diffusers":
            bfl.unlink()
    return {"ways": ways, "largest_tensor": largest, "allowed_peak": 3 * largest + 600_000_000}


def generate(path: pathlib.Path, config: MMDiTConfig) -> int:
    """A file of random bfloat16 weights; the bytes of its largest tensor."""
    entries = [save.Entry(key, np.dtype(ml_dtypes.bfloat16), shape)
               for key, shape in keymaps.expected(config, "bfl").items()]
    noise = np.random.default_rng(0).standard_normal(BLOCK // 2, np.float32).astype(ml_dtypes.bfloat16).view(np.uint8)

    def contents():
        for i, entry in enumerate(entries):
            for start in range(0, entry.nbytes, BLOCK):
                size = min(BLOCK, entry.nbytes - start)
                turn = 2 * (i * 977 + start // BLOCK * 131) % (BLOCK - size + 2)
                yield noise[turn:turn + size]

    with save.beside(path) as place:
        save.sync(save.write(place, config, entries, contents(), folder=False))
    return max(entry.nbytes for entry in entries)


def _timed(command: list[str], result: pathlib.Path | None = None) -> tuple[float, int]:
    """Seconds of a command, with fsync of its result, and its greatest resident memory in bytes."""
    if result:
        result.unlink(missing_ok=True)
    os.sync()
    started = time.perf_counter()
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:  # what wait4 tells would count this process's own memory, from before the exec
        peak = max(peak, _peak(process.pid))
        time.sleep(0.02)
    if result:
        save.sync([result])
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])} failed with status {process.returncode}")
    if result:
        result.unlink()
    return seconds, peak


def _peak(pid: int) -> int:
    """The greatest resident memory of a process so far, in bytes; 0 where it has just ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0
